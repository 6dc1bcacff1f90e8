"""Blockers: states of a VM, as reported by QEMU, in which it must not be written to.

QEMU and KVM do not see a write from outside: it is in no dirty log, write protection or recording.
And it goes to the present memory map and host pages.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ovr.errors import CheckFailed
from ovr.vm.qmp import Monitor

__all__ = ["balloon_size", "blockers", "refuse_migration"]

_MIGRATION_RESTS: Final = {None, "none", "cancelled", "completed", "failed"}
_CONFIDENTIAL: Final = re.compile(r"child<(?:sev|sev-snp|tdx)-guest>")
_EJECTION: Final = (0x3, 0x103)  # ACPI 6.5, 6.3.5 _OST: a requested ejection
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
"""A QEMU without one of these queries lacks the feature, too."""


def blockers(qmp: Monitor, balloon: int | None = None) -> tuple[CheckFailed, ...]:
    """Return the blockers of this VM that are not about its RAM; empty if it may be written to.

    Args:
        qmp: a connection to the VM.
        balloon: an earlier result of `balloon_size`; if it has changed, the balloon is moving.

    Raises:
        VmUnreachable: QMP broke.
    """
    answers = qmp.ask(_QUERIES)
    reasons = (
        _state(_fields(answers["query-status"])),
        _migration(_fields(answers["query-migrate"])),
        *_tracking(answers),
        _replay(_fields(answers["query-replay"])),
        *_confidential(answers),
        _balloon(_fields(answers["query-balloon"]), balloon),
        *_memory_devices(answers),
    )
    return tuple(CheckFailed(*reason) for reason in reasons if reason)


def refuse_migration(qmp: Monitor) -> None:
    """Check again, before the tree runs, that no migration of the VM has begun.

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
"""Message and hint."""


def _state(status: Mapping[str, Any]) -> Reason:
    state = status.get("status")
    if state in {"running", "paused"}:
        return None
    return f"the VM is not up: its state is {state}", "wait until it runs"


def _migration(migration: Mapping[str, Any]) -> Reason:
    # A migration would miss our writes; a background snapshot would contain them.
    status = migration.get("status")
    if status in _MIGRATION_RESTS:
        return None
    return (
        f"the VM migrates, or is being saved (state {status})",
        "wait until that has ended, and restore where the VM runs then",
    )


def _tracking(answers: Mapping[str, Any]) -> Iterator[Reason]:
    rate = _fields(answers["query-dirty-rate"])
    # Pages are sampled without any tracking; before 6.2 there is no other mode.
    if rate.get("status") == "measuring" and rate.get("mode", "page-sampling") != "page-sampling":
        yield (
            f"the VM's dirty pages are tracked (calc-dirty-rate, {rate['mode']})",
            f"wait until that has ended: it takes {rate.get('calc-time')} s",
        )
    if _items(answers["query-vcpu-dirty-limit"]):
        yield (
            "the VM's dirty pages are tracked (set-vcpu-dirty-limit)",
            "end that with cancel-vcpu-dirty-limit",
        )


def _replay(replay: Mapping[str, Any]) -> Reason:
    mode = replay.get("mode", "none")
    if mode == "none":
        return None
    return (
        f"QEMU records or replays the VM (mode {mode}), which a write from outside would break",
        "start the VM without -icount rr=",
    )


def _confidential(answers: Mapping[str, Any]) -> Iterator[Reason]:
    names = [
        str(item.get("name"))
        for item in _items(answers["qom-list"])
        if _CONFIDENTIAL.fullmatch(str(item.get("type")))
    ]
    if _fields(answers["query-sev"]).get("enabled") is True and not names:
        names.append("SEV")
    support = answers["qom-get"]
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
        "wait until it has the requested size, then restore again",
    )


def _memory_devices(answers: Mapping[str, Any]) -> Iterator[Reason]:
    for device in _items(answers["query-memory-devices"]):
        data = _fields(device.get("data"))
        if device.get("type") == "virtio-mem" and data.get("size") != data.get("requested-size"):
            yield (
                f"memory of the VM is being plugged or unplugged: {data.get('id') or 'virtio-mem'}"
                f" has {data.get('size')} bytes, {data.get('requested-size')} are requested",
                "wait, or set its requested-size to its present size",
            )
    for slot in _items(answers["query-acpi-ospm-status"]):
        ejecting = slot.get("source") in _EJECTION and slot.get("status") == _IN_PROGRESS
        if slot.get("slot-type") == "DIMM" and ejecting:
            yield (
                "memory of the VM is being unplugged: DIMM"
                f" {slot.get('device') or slot.get('slot')}",
                "wait until the guest has released it (event DEVICE_DELETED)",
            )


def _fields(answer: Any) -> Mapping[str, Any]:
    return answer if isinstance(answer, dict) else {}


def _items(answer: Any) -> list[dict[str, Any]]:
    return [item for item in answer if isinstance(item, dict)] if isinstance(answer, list) else []
