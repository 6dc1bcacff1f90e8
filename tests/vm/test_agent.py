"""Whom the agent serves: the host, and of it who can read the VM's RAM."""

import secrets
import time
from contextlib import suppress
from pathlib import Path

import pytest

import ovr
from ovr.attempt import authentication
from ovr.errors import AgentUnreachable, AgentUntrusted, AttemptFailed
from ovr.guest import protocol
from ovr.guest.client.agent import Agent
from ovr.guest.client.link import open_link
from ovr.guest.wire import decode, encode
from ovr.lab.workload import build_workload
from tests.vm.conftest import alive

KNOCK = Path(__file__).parent / "programs" / "knock.c"
HELLO = encode(protocol.Hello(protocol.VERSION, secrets.token_bytes(protocol.TOKEN_SIZE)))


@pytest.fixture(params=("trixie",))
def suite(request):
    return request.param


def test_processes_of_the_guest_are_not_answered(vm):
    vm.put(build_workload(KNOCK, "-D_GNU_SOURCE"), "/usr/local/bin/knock", 0o755)
    done = vm.sh("modprobe -q vsock_loopback; /usr/local/bin/knock 687", input=HELLO)
    said = dict(line.split(": ") for line in done.stdout.decode().splitlines())
    assert set(said) == {"loopback 5555", "own 5555", "loopback 687", "own 687"}
    assert said["loopback 5555"] == said["own 5555"] == "7"  # there is a way to a process
    assert said["loopback 687"] == said["own 687"] == "0"


def heard(link, last: bytes, seconds: float = 30.0) -> bytes:
    """Return the data received in time, until it ends with `last`."""
    found = b""
    deadline = time.monotonic() + seconds
    with suppress(AgentUnreachable):
        while not (last and found.endswith(last)):
            found += link.receive(deadline)
    return found


def test_a_port_whose_host_comes_back(vm):
    """The news that a host has left may come late, and its successor have begun already."""
    first = protocol.MAGIC + HELLO + encode(protocol.Ping(6))
    with open_link(vm.serial, 10.0) as link:
        link.send(bytes(protocol.SYNC_ZEROS) + first, time.monotonic() + 30)
        assert heard(link, b"number\x06").endswith(b"number\x06")
    with open_link(vm.serial, 10.0) as link:  # at once
        link.send(encode(protocol.Ping(7)), time.monotonic() + 10)
        assert decode(heard(link, b"number\x07")[4:]) == protocol.Pong(7)
    time.sleep(5)
    with open_link(vm.serial, 10.0) as link:  # too late
        link.send(encode(protocol.Ping(8)), time.monotonic() + 10)
        assert heard(link, b"", 3.0) == b""
    with Agent.connect(vm.serial) as agent:
        agent.ping()


def test_a_proof_ends_with_its_host(vm):
    """The next program to open the port has not authenticated."""
    with ovr.attach(f"lab:{vm.name}") as attached, Agent.connect(vm.serial) as agent:
        authentication.authenticate_alone(attached.kernel, agent, attached.qmp, attached.ram.slots)
        agent.ping()
    time.sleep(1)
    with open_link(vm.serial, 10.0) as link:
        link.send(encode(protocol.Ping(9)), time.monotonic() + 10)
        assert b"the link to the host broke" in heard(link, b"broke")
        assert heard(link, b"", 2.0) == b""


def test_who_cannot_read_the_ram_restores_nothing(vm, dump):
    with vm.connect() as agent, pytest.raises(AttemptFailed, match="not authenticated") as early:
        agent.begin({"inventory.img": b"x"})
    assert early.value.code == "unproven"
    with vm.connect() as agent, pytest.raises(AgentUntrusted) as no:
        agent.authenticate(bytes(protocol.SECRET_SIZE))
    assert no.value.code == "proof"
    assert vm.sh("ls /run/ovr").stdout == b"lock\n"
    with ovr.attach(f"lab:{vm.name}") as attached, vm.connect() as agent:
        authentication.authenticate_alone(attached.kernel, agent, attached.qmp, attached.ram.slots)
        agent.abort()  # of nothing, but it is listened to
        agent.ping()
    assert not alive(vm, dump.pid)
