"""The states of a VM, and whether they permit writes from outside."""

import re
from pathlib import Path

import pytest

from ovr.errors import CheckFailed
from ovr.vm.blockers import balloon_size, blockers, refuse_migration
from ovr.vm.qmp import ExecuteError, Monitor

GIB = 1 << 30

# QEMU 7.2.22, of a lab VM that runs.
QUIET = {
    "query-status": {"status": "running", "singlestep": False, "running": True},
    "query-migrate": {},
    "query-dirty-rate": {
        "status": "unstarted", "sample-pages": 0, "mode": "page-sampling", "start-time": 0,
        "calc-time": 0,
    },
    "query-vcpu-dirty-limit": [],
    "query-replay": {"icount": 0, "mode": "none"},
    "query-memory-devices": [],
    "query-acpi-ospm-status": [{"source": 0, "status": 0, "slot": "0", "slot-type": "CPU"}],
    "query-sev": {"enabled": False, "state": "uninit"},
    "qom-list": [{"name": "type", "type": "string"}, {"name": "ram0", "type": "child<memory>"}],
    "qom-get": "",
}  # fmt: skip
VIRTIO_MEM = {
    "type": "virtio-mem",
    "data": {"id": "vm0", "memaddr": 4 * GIB, "requested-size": GIB, "size": GIB, "max-size": GIB},
}


class Qemu(Monitor):
    """Answers as it was told to, and knows no other command."""

    qemu_pid = 1

    def __init__(self, answers):
        self.answers = answers

    def close(self):
        pass

    def execute(self, command, **arguments):
        if command == "qom-list":
            assert arguments == {"path": "/objects"}
        if command not in self.answers:
            raise ExecuteError(command, "CommandNotFound", "The command has not been found")
        return self.answers[command]

    def _unreachable(self, what):
        raise NotImplementedError


def with_answers(**answers):
    return Qemu({**QUIET, **{key.replace("_", "-"): value for key, value in answers.items()}})


def virtio_mem(**data):
    return [{**VIRTIO_MEM, "data": {**VIRTIO_MEM["data"], **data}}]


def ospm(**slot):
    return [{"device": "d1", "slot": "0", "slot-type": "DIMM", **slot}]


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"query_status": {"status": "paused"}, "query_migrate": {"status": "completed"}},
        {"query_dirty_rate": {"status": "measured", "mode": "dirty-bitmap"}},
        {"query_dirty_rate": {"status": "measuring", "mode": "page-sampling"}},
        {"query_memory_devices": [VIRTIO_MEM, {"type": "dimm", "data": {"id": "d1"}}]},
        {"query_acpi_ospm_status": ospm(source=3, status=0)},
        {"query_acpi_ospm_status": ospm(source=1, status=0x84)},
        {"query_balloon": {"actual": GIB}},
    ],
)
def test_no_refusals(answers):
    assert blockers(with_answers(**answers), balloon=GIB) == ()


def test_a_qemu_that_knows_none_of_the_newer_commands():
    old = {name: QUIET[name] for name in ("query-status", "query-migrate", "qom-list")}
    assert blockers(Qemu(old)) == ()
    assert balloon_size(Qemu(old)) is None


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"query_status": {"status": "prelaunch"}}, "prelaunch"),
        ({"query_status": {"status": "inmigrate"}}, "inmigrate"),
        ({"query_migrate": {"status": "active"}}, "migrates"),
        ({"query_migrate": {"status": "postcopy-paused"}}, "migrates"),
        ({"query_migrate": {"status": "wait-unplug"}}, "migrates"),
        (
            {"query_dirty_rate": {"status": "measuring", "mode": "dirty-ring", "calc-time": 9}},
            "dirty-ring",
        ),
        ({"query_dirty_rate": {"status": "measuring", "mode": "dirty-bitmap"}}, "dirty-bitmap"),
        ({"query_vcpu_dirty_limit": [{"cpu-index": 0, "limit-rate": 5}]}, "set-vcpu-dirty-limit"),
        ({"query_replay": {"icount": 5, "mode": "record"}}, "mode record"),
        ({"qom_list": [{"name": "sev0", "type": "child<sev-guest>"}]}, "confidential .sev0"),
        ({"qom_list": [{"name": "t", "type": "child<tdx-guest>"}]}, "confidential"),
        ({"query_sev": {"enabled": True}}, "confidential .SEV"),
        ({"qom_get": "/objects/pef0"}, "confidential ./objects/pef0"),
        ({"query_balloon": {"actual": GIB // 2}}, "inflating.* 1024 MiB and has 512 MiB"),
        ({"query_balloon": {"actual": 2 * GIB}}, "deflating"),
        ({"query_memory_devices": virtio_mem(size=0)}, "vm0 has 0 bytes"),
        ({"query_acpi_ospm_status": ospm(source=3, status=0x84)}, "unplugged: DIMM d1"),
        ({"query_acpi_ospm_status": ospm(source=0x103, status=0x84)}, "unplugged"),
    ],
)
def test_refusals(answers, words):
    (error,) = blockers(with_answers(**answers), balloon=GIB)
    assert re.search(words, str(error))
    assert error.hint
    assert error.exit_code == 4


def test_each_refusal_is_in_the_documentation():
    said = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    for words in (
        "### the VM is not up: …", "### the VM migrates, or is being saved (state …)",
        "### the VM's dirty pages are tracked (…)", "### QEMU records or replays …",
        "### the VM is confidential (…): its RAM is encrypted", "### the VM's balloon is …",
        "### memory of the VM is being …", "### another ovr restores into this VM: …",
        "### the guest was rebooted since …",
    ):  # fmt: skip
        assert words in said


def test_migration_is_asked_for_again():
    refuse_migration(with_answers())
    with pytest.raises(CheckFailed, match="migrates"):
        refuse_migration(with_answers(query_migrate={"status": "setup"}))
