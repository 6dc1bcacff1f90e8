"""Why a VM must not be written to now: what QEMU says of its state.

A write from outside is seen by nobody in QEMU or in KVM: no dirty log, no write protection, no
recording has it. And it goes to the memory map and the host pages of now.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ovr.errors import CheckFailed
from ovr.vm.qmp import Monitor

__all__ = ["balloon_size", "blockers", "refuse_migration"]

_MIGRATION_RESTS: Final = {None, "none", "cancelled", "completed", "failed"}
_CONFIDENTIAL: Final = re.compile(r"child<(?:sev|sev-snp|tdx)-guest>")
_EJECTION: Final = (0x3, 0x103)  # ACPI 6.5, 6.3.5 _OST: an ejection that was asked for
_IN_PROGRESS: Final = 0x84

_QUERIES: Final[Mapping[str, dict[str, str]]] = {
    "query-status": {},
    "query-migrate": {},
    "query-dirty-rate": {},  # since QEMU 5.2
    "query-vcpu-dirty-limit": {},  # since 7.1
    "query-replay": {},  # since 5.2
    "query-balloon": {},
    "query-memory-devices": {},
    "query-acpi-ospm-status": {},
    "query-sev": {},
    "qom-list": {"path": "/objects"},
    "qom-get": {"path": "/machine", "property": "confidential-guest-support"},  # since 6.0
}
"""A QEMU that does not know one of these has not what it asks for."""


def blockers(qmp: Monitor, balloon: int | None = None) -> tuple[CheckFailed, ...]:
    """Return why this VM must not be written to now, apart from its RAM; empty if it may.

    Args:
        qmp: a connection to the VM.
        balloon: what `balloon_size` said a little earlier: if it says something else now, the
            balloon moves.

    Raises:
        VmUnreachable: QMP broke.
    """
    said = qmp.ask(_QUERIES)
    reasons = (
        _state(_fields(said["query-status"])),
        _migration(_fields(said["query-migrate"])),
        *_tracking(said),
        _replay(_fields(said["query-replay"])),
        *_confidential(said),
        _balloon(_fields(said["query-balloon"]), balloon),
        *_memory_devices(said),
    )
    return tuple(CheckFailed(*reason) for reason in reasons if reason)


def refuse_migration(qmp: Monitor) -> None:
    """Ask again, before the tree may run, whether somebody has begun to move the VM.

    Raises:
        CheckFailed: it migrates.
        VmUnreachable: QMP broke.
    """
    if reason := _migration(_fields(qmp.execute("query-migrate"))):
        raise CheckFailed(*reason)


def balloon_size(qmp: Monitor) -> int | None:
    """Return how many bytes of RAM the balloon leaves the guest; None without a balloon.

    Raises:
        VmUnreachable: QMP broke.
    """
    return _actual(_fields(qmp.ask({"query-balloon": {}})["query-balloon"]))


Reason = tuple[str, str] | None
"""What is wrong and what to do."""


def _state(status: Mapping[str, Any]) -> Reason:
    state = status.get("status")
    if state in {"running", "paused"}:
        return None
    return f"the VM is not up: its state is {state}", "wait until it runs"


def _migration(migration: Mapping[str, Any]) -> Reason:
    # The target of the migration would miss our writes, a background snapshot would have them.
    status = migration.get("status")
    if status in _MIGRATION_RESTS:
        return None
    return (
        f"the VM migrates, or is being saved (state {status})",
        "wait until that is over, and restore where the VM runs then",
    )


def _tracking(said: Mapping[str, Any]) -> Iterator[Reason]:
    rate = _fields(said["query-dirty-rate"])
    # Pages are sampled without any tracking; before 6.2 there is no other mode.
    if rate.get("status") == "measuring" and rate.get("mode", "page-sampling") != "page-sampling":
        yield (
            f"somebody tracks the VM's dirty pages (calc-dirty-rate, {rate['mode']})",
            f"wait until that is over: it takes {rate.get('calc-time')} s",
        )
    if _items(said["query-vcpu-dirty-limit"]):
        yield (
            "somebody tracks the VM's dirty pages (set-vcpu-dirty-limit)",
            "end that with cancel-vcpu-dirty-limit",
        )


def _replay(replay: Mapping[str, Any]) -> Reason:
    mode = replay.get("mode", "none")
    if mode == "none":
        return None
    return (
        f"QEMU records or replays what the VM does (mode {mode}): a write from outside breaks that",
        "start the VM without -icount rr=",
    )


def _confidential(said: Mapping[str, Any]) -> Iterator[Reason]:
    names = [
        str(item.get("name"))
        for item in _items(said["qom-list"])
        if _CONFIDENTIAL.fullmatch(str(item.get("type")))
    ]
    if _fields(said["query-sev"]).get("enabled") is True and not names:
        names.append("SEV")
    support = said["qom-get"]
    if isinstance(support, str) and support and not names:
        names.append(support)
    for name in names:
        yield (
            f"the VM is confidential ({name}): its RAM is encrypted",
            "restore with the guest's own CRIU",
        )


def _actual(balloon: Mapping[str, Any]) -> int | None:
    actual = balloon.get("actual")
    return actual if isinstance(actual, int) else None


def _balloon(balloon: Mapping[str, Any], before: int | None) -> Reason:
    now = _actual(balloon)
    if before is None or now is None or now == before:
        return None
    return (
        f"the VM's balloon is {'inflating' if now < before else 'deflating'}: the guest had"
        f" {before >> 20} MiB and has {now >> 20} MiB",
        "wait until it has the size that was asked for, then restore again",
    )


def _memory_devices(said: Mapping[str, Any]) -> Iterator[Reason]:
    for device in _items(said["query-memory-devices"]):
        data = _fields(device.get("data"))
        if device.get("type") == "virtio-mem" and data.get("size") != data.get("requested-size"):
            yield (
                f"memory of the VM is being plugged or unplugged: {data.get('id') or 'virtio-mem'}"
                f" has {data.get('size')} bytes, and {data.get('requested-size')} are asked for",
                "wait, or set its requested-size to the size that it has",
            )
    for slot in _items(said["query-acpi-ospm-status"]):
        ejecting = slot.get("source") in _EJECTION and slot.get("status") == _IN_PROGRESS
        if slot.get("slot-type") == "DIMM" and ejecting:
            yield (
                "memory of the VM is being unplugged: DIMM"
                f" {slot.get('device') or slot.get('slot')}",
                "wait until the guest has let go of it (event DEVICE_DELETED)",
            )


def _fields(answer: Any) -> Mapping[str, Any]:
    return answer if isinstance(answer, dict) else {}


def _items(answer: Any) -> list[dict[str, Any]]:
    return [item for item in answer if isinstance(item, dict)] if isinstance(answer, list) else []
