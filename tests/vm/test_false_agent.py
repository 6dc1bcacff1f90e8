"""A program that poses as the agent gets nothing, whatever looks like the secret in memory."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ovr
from ovr.errors import AgentUntrusted
from ovr.guest import compiler
from ovr.guest.client import secret_page
from ovr.guest.protocol import VSOCK_PORT
from ovr.guest.wire import header
from ovr.lab.workload import build_workload
from tests.liar.proxy import LyingAgent
from tests.vm.conftest import alive
from tests.vm.test_failures import ovr_command, refused, unharmed

SOURCE = Path(__file__).parent / "programs" / "impostor"
GUEST = Path(compiler.__file__).parent
FROM_THE_AGENT = (
    "agent.h",
    "message.h",
    "msgpack.h",
    "msgpack.c",
    "message.c",
    "proof.c",
    "sha256.c",
)
PORT = 5000

KINDS = {
    "user": ("credentials", "runs as user 1000", {"why_not_root"}),
    "namespace": ("credentials", "in a user namespace of its own", {"why_not_root"}),
    "container": ("credentials", "lacks capabilities", {"why_not_root"}),
    "environment": ("credentials", "that raises privileges", {"_is_secure", "_is_by_itself"}),
    "heap": ("secret", "no page with the agent's secret", {"_is_by_itself"}),
    "locked": ("secret", "no page with the agent's secret", {"_is_by_itself"}),
}  # fmt: skip
"""In whose memory the secret lies; what is said; the checks without which it would be taken."""
OFF = {
    "why_not_root": lambda kernel, task: "",
    "_is_secure": lambda mm: False,
    "_is_by_itself": lambda mm, address: True,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("impostor") / "source"
    shutil.copytree(SOURCE, where)
    for name in FROM_THE_AGENT:
        shutil.copy(GUEST / name, where)
    (where / "protocol.h").write_text(header())
    return build_workload(where, "-D_GNU_SOURCE")


class Impostor:
    """A program in the guest that poses as the agent; it serves one host."""

    def __init__(self, vm, kind: str) -> None:
        self._vm = vm
        self.address = vm.agent.replace(f":{VSOCK_PORT}", f":{PORT}")
        vm.sh("pkill -9 -x impostor; rm -f /run/impostor.log; true")
        with vm.connect() as agent:
            agent.spawn(["/usr/local/bin/impostor", kind, str(PORT)], output="/run/impostor.log")
        deadline = time.monotonic() + 60
        while "listening" not in self.said:
            assert time.monotonic() < deadline, self.said
            time.sleep(0.1)

    @property
    def said(self) -> str:
        return self._vm.sh("cat /run/impostor.log").stdout.decode()

    @property
    def sent(self) -> list[str]:
        """The messages that it was sent."""
        return [line.split()[-1] for line in self.said.splitlines() if "was sent" in line]


@contextmanager
def impostor(vm, program: Path, kind: str) -> Iterator[Impostor]:
    vm.put(program, "/usr/local/bin/impostor", 0o755)
    try:
        yield Impostor(vm, kind)
    finally:
        vm.sh("pkill -9 -x impostor; rm /usr/local/bin/impostor")


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_poses_as_the_agent_is_sent_nothing(vm, dump, program, kind):
    code, reason, _ = KINDS[kind]
    with impostor(vm, program, kind) as false, ovr.attach(f"lab:{vm.name}") as attached:
        with pytest.raises(AgentUntrusted, match=f"is not root's: .*{reason}") as caught:
            attached.restore(dump.path, agent=false.address)
        assert (caught.value.code, caught.value.exit_code) == (code, 3)
        assert "a user of the guest may pose as the agent" in caught.value.hint
        assert false.sent == ["hello"]
    assert not alive(vm, dump.pid)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_these_checks_that_keep_it_out(vm, dump, program, kind, monkeypatch):
    """With them switched off it is sent the images: else the test above would show nothing."""
    for name in KINDS[kind][2]:
        monkeypatch.setattr(secret_page, name, OFF[name])
    with impostor(vm, program, kind) as false, ovr.attach(f"lab:{vm.name}") as attached:
        # It has no CRIU, and its host is not to wait for one.
        enough = "until grep -q begin /run/impostor.log; do sleep 0.2; done; pkill -9 -x impostor"
        vm.sh(f"({enough}) >/dev/null 2>&1 &")
        with pytest.raises(ovr.errors.AgentUnreachable):
            attached.restore(dump.path, agent=false.address)
        assert {"prove", "files", "begin"} <= set(false.sent)


def test_who_names_the_agents_own_secret_does_not_know_it(vm, dump, program):
    with vm.connect() as agent:
        hello = agent.hello
    kind = f"agent:{hello.pid}:{hello.secret_at}"
    with impostor(vm, program, kind) as false, ovr.attach(f"lab:{vm.name}") as attached:
        with pytest.raises(AgentUntrusted) as caught:
            attached.restore(dump.path, agent=false.address)
        assert caught.value.code == "proof"
        assert false.sent == ["hello", "prove"]


def test_a_user_cannot_take_the_agents_port(vm, program):
    with impostor(vm, program, "user") as false:
        assert f"port {VSOCK_PORT}: Permission denied" in false.said
        assert f"port {VSOCK_PORT + 1}: Permission denied" in false.said
        assert "listening as user 1000" in false.said


def test_commands_say_so(vm, dump, program):
    with impostor(vm, program, "user") as false:
        done = ovr_command(
            "restore", "-D", dump.path, "--vm", f"lab:{vm.name}", "--agent", false.address
        )
        refused(done, 3, "is not root's: pid", "runs as user 1000", "(a user of the guest may pose")
    with impostor(vm, program, "user") as false:
        done = ovr_command("check", "--vm", f"lab:{vm.name}", "--agent", false.address)
        assert done.returncode == 4
        assert "FAIL  agent" in done.stdout
        assert "runs as user 1000" in done.stdout
    with impostor(vm, program, "user") as false:
        done = ovr_command(
            "warm", "--vm", f"lab:{vm.name}", "--agent", false.address, "--size", "16M"
        )
        refused(done, 3, "runs as user 1000")
        assert false.sent == ["hello"]
    unharmed(vm, dump)


@pytest.mark.parametrize("lie", ["held by another", "held by nobody"])
def test_a_tree_that_another_holds(vm, dump, tmp_path, lie):
    """The CRIU that is named must be the agent's: root's process 1 is not, though root's."""
    with LyingAgent(vm.agent, tmp_path / "liar", lie, "1") as liar:
        with (
            ovr.attach(f"lab:{vm.name}") as attached,
            pytest.raises(AgentUntrusted, match="not the agent's CRIU") as caught,
        ):
            attached.restore(dump.path, agent=f"unix:{tmp_path / 'liar'}:1")
        assert liar.told == 1
    assert caught.value.code == "tracer"
    assert not alive(vm, dump.pid)
    unharmed(vm, dump)
