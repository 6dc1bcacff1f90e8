"""A running tree, and a stand-in for CRIU that dumps it, for the agent of `agent_host`.

The stand-in holds the tree with real ptrace stops, writes images, calls its action scripts where
CRIU does, and takes their exit status as ``cr_dump_finish()`` in criu/cr-dump.c does. Each task of
the tree counts, in shared memory.
"""

import mmap
import os
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ovr.guest import dump_protocol, protocol
from ovr.guest.client.results import HeldTree
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import (
    FAKE_CRIU,
    PYTHON,
    AgentHost,
    alive,
    children,
    valgrind_command,
    wait_for,
)

PARENT = {"inventory.img": b"parent", "pagemap-1.img": b"\x00" * 100}
STATS = b"statistics"

_DUMPING = """
engine = "--engine" in sys.argv
if engine and "--mode" in sys.argv and os.environ.get("CRIU_CONFIG_FILE"):
    with open(os.environ["CRIU_CONFIG_FILE"]) as config:
        for name, *values in map(str.split, config):
            sys.argv += ["--" + name, *(value.strip('"') for value in values)]
assert sys.argv[1] == "dump" and "--track-mem" in sys.argv
options = dict(zip(sys.argv[2:], sys.argv[3:]))
scripts = [word for option, word in zip(sys.argv, sys.argv[1:]) if option == "--action-script"]
work, images, mode, gate = (options[name] for name in ("-W", "-D", "--mode", "--gate"))
if mode == "no-hook":
    scripts = []
log = open(work + "/" + options["-o"], "w")
root = int(options["-t"])
parent = os.path.join(images, options["--prev-images-dir"])
assert os.listdir(parent)
if engine and not os.path.islink(images + "/parent"):
    os.symlink(options["--prev-images-dir"], images + "/parent")


def say(line):
    print(line, file=log, flush=True)


def at(stage):
    open(gate + "/at-" + stage, "w").close()
    if mode == "wait-" + stage:
        while not os.path.exists(gate + "/open"):
            time.sleep(0.01)
    if mode == "sleep-" + stage:
        time.sleep(float(options.get("--seconds", "4.5")))
    if mode == "crash-" + stage:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "fail-" + stage:
        say("(00.1) Error (criu/tty.c:1): at " + stage)
        return True
    return False


def run_scripts(action, root):
    result = 0
    for script in scripts:
        env = dict(os.environ, CRTOOLS_SCRIPT_ACTION=action, CRTOOLS_IMAGE_DIR=images)
        pid = os.fork()
        if not pid:
            command = {valgrind!r} + [script]
            os.execve(command[0], command, dict(env, CRTOOLS_INIT_PID=str(root)))
        result |= os.waitpid(pid, 0)[1]
    return result


def children(pid):
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return [int(word) for word in file.read().split()]


def write_images():
    for name in ("inventory.img", "core-1.img", "empty.img"):
        with open(images + "/" + name, "wb") as file:
            file.write(name.encode() * (0 if name == "empty.img" else 1000))
    for name in ("pages-1.img", "pipes-data.img"):
        with open(images + "/" + name, "wb") as file:
            for number in range(int(options["--kib"])):
                file.write(number.to_bytes(4, "little") * 256)
    if mode == "hostile":
        os.symlink("../images", images + "/parent")
        os.symlink("/etc/passwd", images + "/link.img")
        os.mkfifo(images + "/fifo.img")
        os.chdir(images)  # the path of a socket is short
        socket.socket(socket.AF_UNIX).bind("socket.img")


FAILED = "(00.9) Error (criu/cr-dump.c:2): Dumping FAILED."
if at("start") or run_scripts("pre-dump", root):
    say(FAILED)
    raise SystemExit(1)
if engine:
    assert os.readlink(images + "/parent")[0] == "/" or not scripts
    if "inventory.img" not in os.listdir(images + "/parent"):
        say("(00.2) Error (criu/mem.c:354): no parent inventory")
        say(FAILED)
        raise SystemExit(1)
tree = [root, *children(root)]
for pid in tree if mode != "no-tree" else []:
    if libc.ptrace(SEIZE, pid, None, None) or libc.ptrace(INTERRUPT, pid, None, None):
        raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(pid, 0x40000000)
failed = at("seized")
write_images()
code = 0
if not failed:
    status = run_scripts("post-dump", int(options.get("--report", root)))
    code = status >> 8 & 0xff
failed = failed or at("end")
ends = not failed and not code and "--leave-running" not in sys.argv
for pid in reversed(tree):
    if ends:
        os.kill(pid, signal.SIGKILL)
    libc.ptrace(DETACH, pid, None, None)
say(FAILED if failed or code else "(00.9) Dumping finished successfully")
if not failed and not code:
    with open(work + "/stats-dump", "wb") as file:
        file.write({stats!r})
raise SystemExit(code or failed)
"""

_COUNTER = """
import ctypes, mmap, os, sys, time

ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG
with open(sys.argv[1], "r+b") as file:
    counters = memoryview(mmap.mmap(file.fileno(), 4096)).cast("Q")
me = 0 if os.fork() else 1
if me:
    ctypes.CDLL(None).prctl(1, 9)
    counters[2] = os.getpid()
while True:
    counters[me] += 1
    time.sleep(0.001)
"""


class Tree:
    """A root task and its child, which count."""

    def __init__(self, directory: Path) -> None:
        self.memory = directory / "counters"
        self.memory.write_bytes(bytes(4096))
        self._file = self.memory.open("rb")
        self._map = mmap.mmap(self._file.fileno(), 4096, access=mmap.ACCESS_READ)
        self.process = subprocess.Popen([PYTHON, "-Sc", _COUNTER, self.memory])
        wait_for(lambda: all(self.counts) and self._words[2])
        self.pids = (self.process.pid, self._words[2])

    @property
    def _words(self) -> tuple[int, ...]:
        return struct.unpack_from("3Q", self._map)

    @property
    def counts(self) -> tuple[int, int]:
        """The counter of each task."""
        return self._words[0], self._words[1]

    def runs(self) -> bool:
        """Whether both tasks count within a short time."""
        before = self.counts
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            if all(new > old for old, new in zip(before, self.counts, strict=True)):
                return True
            time.sleep(0.005)
        return False

    def is_stopped(self) -> bool:
        """Whether neither task counts."""
        before = self.counts
        time.sleep(0.1)
        return self.counts == before

    def tracers(self) -> set[int]:
        """The pids of those that trace a task; 0 for none."""
        lines = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids]
        return {int(text.split("TracerPid:")[1].split()[0]) for text in lines}

    def close(self) -> None:
        """End the tree."""
        self.process.kill()
        self.process.wait()
        wait_for(lambda: not alive(*self.pids))
        self._map.close()
        self._file.close()


@contextmanager
def counting(host: AgentHost) -> Iterator[Tree]:
    """Run a tree, and have the host's agent dump with the stand-in."""
    criu = host.directory / "criu"
    criu.write_text(
        (FAKE_CRIU + _DUMPING).format(
            python=PYTHON, valgrind=valgrind_command(host.directory), stats=STATS
        )
    )  # fmt: skip
    tree = Tree(host.directory)
    try:
        yield tree
    finally:
        open_gate(host)
        tree.close()


def options(host: AgentHost, mode: str = "ok", kib: int = 4, *more: str) -> tuple[str, ...]:
    """What tells the stand-in how to behave."""
    return ("--gate", str(host.directory), "--mode", mode, "--kib", str(kib), *more)


def open_gate(host: AgentHost) -> None:
    """Let a stand-in that waits go on."""
    (host.directory / "open").touch()


def open_gate_later(host: AgentHost, seconds: float) -> None:
    """Let it go on in some time."""
    threading.Timer(seconds, open_gate, [host]).start()


def has_come_to(host: AgentHost, stage: str) -> bool:
    """Whether the stand-in has come to that stage: start, seized, end."""
    return (host.directory / f"at-{stage}").exists()


def shut_gate(host: AgentHost) -> None:
    """Have the next stand-in wait where its mode says so."""
    for path in (host.directory / "open", *host.directory.glob("at-*")):
        path.unlink(missing_ok=True)


class Images(dict[str, bytes]):
    """The images that were saved; those that have not ended are in `open`."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.open: set[str] = set()
        self._pause = pause

    def save(self, name: str, data: bytes) -> None:
        time.sleep(self._pause)
        assert name in self.open or name not in self
        self[name] = self.get(name, b"") + data
        (self.open.add if data else self.open.discard)(name)


def expected(kib: int = 4) -> dict[str, bytes]:
    """The images that the stand-in writes, but for pages images."""
    small = {name: name.encode() * 1000 for name in ("inventory.img", "core-1.img")}
    return small | {"empty.img": b"", "pipes-data.img": large(kib)}


def large(kib: int) -> bytes:
    """The content of the large images, and of the pages image."""
    return b"".join(number.to_bytes(4, "little") * 256 for number in range(kib))


def dump(agent: LabAgent, pid: int, save: Callable[[str, bytes], None], **options: Any) -> HeldTree:
    """Have the stand-in dump a process and hold it."""
    agent.start_dump(pid, PARENT, **options)
    with agent.keep_alive(options.get("silence", 4.0) / 4):
        agent.track(stop=True)
        return agent.held(save)


def begin(
    host: AgentHost, agent: LabAgent, tree: Tree, images: Images | None = None,
    criu_options: Sequence[str] | None = None, **limits: float,
) -> HeldTree:  # fmt: skip
    """Have the stand-in dump the tree and hold it."""
    images = Images() if images is None else images
    return dump(
        agent, tree.process.pid, images.save,
        criu_options=options(host) if criu_options is None else criu_options, **limits,
    )  # type: ignore[arg-type]  # fmt: skip


def start(
    host: AgentHost, agent: LabAgent, tree: Tree, criu_options: Sequence[str], silence: float = 60
) -> None:
    """Send the request, and read nothing."""
    request = dump_protocol.Dump(
        tree.process.pid, tuple(criu_options), False, int(silence * 1000), 60000, 2, False
    )
    agent._dumps = True
    for message in (protocol.Files(tuple(PARENT), tuple(PARENT.values())), request):
        agent._send(message)


def stop(host: AgentHost, agent: LabAgent, tree: Tree, *options: Any) -> None:
    """Have the stand-in stop the tree, and read nothing from then on; as `start`."""
    start(host, agent, tree, *options)
    agent._outcome(dump_protocol.Starts)
    agent._send(dump_protocol.Track(stop=True))


def criu_of(host: AgentHost) -> int:
    """The pid of the stand-in."""

    def found() -> list[int]:
        return children(host.process.pid, lambda words: "--track-mem" in words)

    wait_for(found)
    (pid,) = found()
    return pid


def assert_unharmed(host: AgentHost, tree: Tree) -> None:
    """The tree runs, nothing is left of the dump, and the next one succeeds."""
    wait_for(lambda: tree.tracers() == {0})
    assert tree.runs()
    wait_for(lambda: not host.restores)
    # The agent may have been raised: it has let go of that, too.
    wait_for(lambda: os.sched_getscheduler(host.process.pid) == os.SCHED_OTHER)
    assert not programs_of(host)
    shut_gate(host)
    with host.connect() as other:
        images = Images()
        held = dump(
            other, tree.process.pid, images.save, criu_options=options(host), leave_running=True
        )
        assert images == expected()
        assert sorted(held.tasks) == sorted(tree.pids)
        assert tree.is_stopped()
        assert other.end_dump() == STATS
    assert tree.runs()
    wait_for(lambda: not host.restores)


def programs_of(host: AgentHost) -> list[str]:
    """Command lines of stand-ins and hooks of this host, which have not ended."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit() or int(directory.name) == host.process.pid:
            continue
        try:
            words = (directory / "cmdline").read_bytes().decode(errors="replace")
            socket = f"OVR_HOOK_SOCKET={host.directory}".encode()
            if words and socket in (directory / "environ").read_bytes():
                found.append(words)
        except OSError:
            continue
    return found
