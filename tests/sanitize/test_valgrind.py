"""The agent under valgrind in a guest, with the guest's own CRIU: restores, an abort, its end.

Run by ``python -m tests.sanitize valgrind``.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import ovr
from ovr import lab
from ovr.attempt import settings
from ovr.errors import AttemptFailed
from ovr.guest import build
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.vm import pool
from tests.vm.test_failures import restart_agent

AGENT = "/usr/local/sbin/ovr-agent"
PROGRAMS = ("private", "memfd", "cow")
LOGS = "/var/log/valgrind"
# CRIU's action script is valgrind with the agent as its client: as such it runs without valgrind.
UNDER_VALGRIND = f"""#!/bin/sh
mkdir -p {LOGS}
exec valgrind -q --leak-check=full --log-file={LOGS}/%p --trace-children=no {AGENT}.real "$@"
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    share = tmp_path_factory.mktemp("images")
    name = f"valgrind-a-{os.getpid()}"
    with demo.lab_vm(name, memory="1G", share=share) as vm:
        for program in map(pool.BY_NAME.__getitem__, PROGRAMS):
            pool.install(vm, program)
            pid = pool.start(vm, program)
            (share / program.name).mkdir()
            pool.dump(vm, program, pid, f"{SHARE}/{program.name}")
    return share


@pytest.fixture(scope="module")
def vm(tmp_path_factory) -> Iterator[lab.LabVm]:
    name = f"valgrind-b-{os.getpid()}"
    script = tmp_path_factory.mktemp("script") / "ovr-agent"
    script.write_text(UNDER_VALGRIND)
    with demo.lab_vm(name, memory="2G", packages=("valgrind",)) as vm:
        vm.put(build(lab=True, flags=("-O1",)), f"{AGENT}.real", 0o755)
        vm.put(script, AGENT, 0o755)  # another file: the agent that runs is not touched
        restart_agent(vm, patience=120.0)
        assert vm.sh("readlink /proc/$PPID/exe").stdout.strip().endswith(b"memcheck-amd64-linux")
        yield vm


def test_restores(vm, images, monkeypatch):
    programs = [pool.BY_NAME[name] for name in PROGRAMS]
    for program in programs:
        pool.install(vm, program)
        with ovr.attach(f"lab:{vm.name}") as attached:
            attached.restore(images / program.name, verify="full")
        pool.ask(vm, program)
        pool.end(vm, program)

    def fail(*_: object) -> None:
        raise AttemptFailed("on purpose")

    monkeypatch.setattr(settings, "write", fail)
    for program in programs:
        with (
            ovr.attach(f"lab:{vm.name}") as attached,
            pytest.raises(AttemptFailed, match="on purpose"),
        ):
            attached.restore(images / program.name)
        assert vm.sh(f"pgrep -x pool-{program.name}").status == 1
    restart_agent(vm, patience=120.0)  # what is lost is reported at the end
    said = vm.sh(f"ls {LOGS} | wc -l; cat {LOGS}/*").stdout.decode()
    count, _, errors = said.partition("\n")
    assert int(count) > 5  # the agent twice, and each of its children that ran no other program
    assert errors == ""
