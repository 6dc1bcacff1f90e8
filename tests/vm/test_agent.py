"""Whom the agent serves: the host, and of it who can read the VM's RAM."""

import secrets
from pathlib import Path

import pytest

import ovr
from ovr.errors import RestoreFailed
from ovr.guest import protocol
from ovr.guest.wire import encode
from ovr.lab.workload import build_workload
from ovr.vm import proof
from tests.vm.conftest import alive

KNOCK = Path(__file__).parent / "programs" / "knock.c"
HELLO = encode(protocol.Hello(protocol.VERSION, secrets.token_bytes(protocol.TOKEN_SIZE)))


@pytest.fixture(params=("trixie",))
def suite(request):
    return request.param


def test_processes_of_the_guest_are_not_answered(vm):
    vm.put(build_workload(KNOCK, "-D_GNU_SOURCE"), "/usr/local/bin/knock", 0o755)
    done = vm.sh("modprobe -q vsock_loopback; /usr/local/bin/knock 1024", input=HELLO)
    said = dict(line.split(": ") for line in done.stdout.decode().splitlines())
    assert set(said) == {"loopback 5555", "own 5555", "loopback 1024", "own 1024"}
    assert said["loopback 5555"] == said["own 5555"] == "7"  # there is a way to a process
    assert said["loopback 1024"] == said["own 1024"] == "0"


def test_who_cannot_read_the_ram_restores_nothing(vm, dump):
    with vm.connect() as agent, pytest.raises(RestoreFailed, match="prove first"):
        agent.begin({"inventory.img": b"x"})
    with vm.connect() as agent, pytest.raises(RestoreFailed, match="not what lies in the memory"):
        agent.prove(bytes(protocol.SECRET_SIZE))
        agent.begin({"inventory.img": b"x"})
    assert vm.sh("ls /run/ovr").stdout == b"lock\n"
    with ovr.attach(f"lab:{vm.name}") as attached, vm.connect() as agent:
        proof.prove(attached.kernel, agent)
        agent.abort()  # of nothing, but it is listened to
        agent.ping()
    assert not alive(vm, dump.pid)
