"""The guest agent on this very machine, reached over Unix sockets, with a CRIU of our own.

The stand-in for CRIU makes a real tree (a root and its child), holds it with real ptrace stops,
calls the action script where CRIU does and treats its exit status as CRIU does. What each task
does first when it is let go is to make a directory: a mark that shows that it ran.
"""

import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ovr.errors import AgentUnreachable, AttemptFailed
from ovr.guest import build, protocol
from ovr.guest.client.link import Address, Link
from ovr.guest.client.results import HeldTree
from ovr.guest.codes import Code
from ovr.lab.agent import LabAgent

# Not `sys.executable`: one with AddressSanitizer refuses to have a library loaded before it.
PYTHON = Path(
    str(sysconfig.get_config_var("BINDIR")), f"python{sysconfig.get_config_var('VERSION')}"
)
_PF_EXITING = 0x4  # include/linux/sched.h
SECRET_AT = len(protocol.SECRET_MAGIC) + 3 * 8
"""Where in its page the agent's secret is: `proof.c`."""
one_link = pytest.mark.parametrize("agent", [False], ids=["stream"], indirect=True)
"""For what is the same over each kind of link: the fixture `agent` is a session over one."""
IMAGES = {"inventory.img": b"inventory", "core-1.img": b"\x00" * 5000, "empty.img": b""}

FAKE_CRIU = """#!{python} -Ss
import ctypes, os, signal, socket, sys, time

if "--version" in sys.argv:
    print("Version: 9.9.9")
    raise SystemExit
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
"""
_RESTORING = """
started = time.monotonic()
options = dict(zip(sys.argv[2:], sys.argv[3:]))
work, script, marks = options["-W"], options["--action-script"], options["--marks"]
mode = options["--mode"]
log = open(work + "/" + options.get("-o", "restore.log"), "w")


def say(line):
    print(line, file=log, flush=True)


def run_script(action, root=None):
    command = {valgrind} + [script]
    env = dict(os.environ, CRTOOLS_SCRIPT_ACTION=action, CRTOOLS_IMAGE_DIR=options["-D"])
    if root:
        env["CRTOOLS_INIT_PID"] = str(root)
    pid = os.fork()
    if not pid:
        os.execve(command[0], command, env)
    return os.waitpid(pid, 0)[1]


def task(gate):
    os.read(gate, 1)
    while True:
        try:
            os.mkdir(marks + "/" + str(os.getpid()))
        except FileExistsError:
            pass


if mode == "fail":
    say("(00.1) Warn  something else")
    say("(00.2) Error (criu/files.c:1): Can't open /nowhere: No such file\\x01")
    say("(00.3) Error (criu/cr-restore.c:2): Restoring FAILED.")
    raise SystemExit(1)
if mode == "talkative":
    say("(00.1) Error (criu/files.c:1): the cause")
    for number in range(100):
        say("(00.2) Error (criu/files.c:2): consequence " + str(number))
    raise SystemExit(1)
if mode == "pid-taken":
    say("(00.2) Error (criu/cr-restore.c:1): Can't fork for 4711: File exists")
    raise SystemExit(1)
if mode == "silent":
    raise SystemExit(3)
if run_script("pre-restore"):
    raise SystemExit(1)
if options.get("--needs") and options["--needs"] not in os.listdir(options["-D"]):
    say("(00.2) Error (criu/image.c:1): Can't open " + options["--needs"])
    raise SystemExit(1)
gate, opener = os.pipe()
pids, reporter = os.pipe()
shared = os.memfd_create("shared")
os.ftruncate(shared, 1 << 16)
root = os.fork()
if not root:
    os.setsid()
    os.write(reporter, (str(os.fork() or os.getpid()) + " ").encode())
    task(gate)
while (found := os.read(pids, 100)).count(b" ") < 2:
    os.write(reporter, found)
    time.sleep(0.01)
tree = {{int(word) for word in found.split()}} | {{root}}
if mode == "stalled":
    time.sleep(60)
if mode == "slow":
    while time.monotonic() < started + 4:
        sum(range(1 << 20))
        time.sleep(0.1)
if mode == "fail-built":
    say("(00.3) Error (criu/cr-restore.c:3): too late")
    for pid in tree:
        os.kill(pid, signal.SIGKILL)
    raise SystemExit(1)
if mode == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
if run_script("post-restore", root):
    for pid in tree:
        os.kill(pid, signal.SIGKILL)
    raise SystemExit(1)
for pid in tree:
    if libc.ptrace(SEIZE, pid, None, None) or libc.ptrace(INTERRUPT, pid, None, None):
        raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(pid, 0x40000000)
os.write(opener, b"go")
if mode != "no-hook":
    run_script("pre-resume", root)
for pid in tree:
    libc.ptrace(DETACH, pid, None, None)
if mode == "fail-late":
    for pid in tree:
        os.kill(pid, signal.SIGKILL)
    raise SystemExit(1)
"""

# Podman, conmon and a runtime as the agent sees them: a program has another one run CRIU, with
# its environment handed down, in the container's directory; it removes CRIU's log when that fails,
# and leaves the container.
_FAKE_PODMAN = """#!{python} -Ss
import os, shutil, subprocess, sys

containers = {directory!r} + "/containers/"
if "rm" in sys.argv:
    if sys.argv[1] == "container":
        shutil.rmtree(containers + sys.argv[-1])
    else:
        open({directory!r} + "/removed", "w").write(" ".join(sys.argv[1:]))
    raise SystemExit
options = dict(zip(sys.argv[2:], sys.argv[3:]))
work = containers + os.urandom(32).hex() + "/userdata"
os.makedirs(work + "/checkpoint")
shutil.copy(options["--import"], work + "/checkpoint/ovr-held-pagemap-1.img")
script = "/bin/true"
if options["--mode"] != "no-config":
    with open(os.environ["CRIU_CONFIG_FILE"]) as config:
        script = config.read().split('"')[1]
command = [{criu!r}, "restore", "-W", work, "-D", work + "/checkpoint", "--action-script", script]
command += ["--needs", "pagemap-1.img", "--marks", options["--marks"], "--mode", options["--mode"]]
runtime = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
done = subprocess.run([sys.executable, "-c", runtime, *command], cwd=work)
if done.returncode:
    os.unlink(work + "/restore.log")
    print("Error: OCI runtime error: CRIU failed", file=sys.stderr)
    raise SystemExit(125)
print("restoring")
print("c0ffee")
"""


@dataclass
class AgentHost:
    """A running agent, and its files."""

    directory: Path
    process: subprocess.Popen[bytes]
    program: Path

    @property
    def stream(self) -> Path:
        """The socket where a connection is a session, as on vsock."""
        return self.directory / "stream"

    @property
    def serial(self) -> Path:
        """The socket with the serial port's synchronisation."""
        return self.directory / "serial"

    @property
    def marks(self) -> set[int]:
        """The pids of the tasks that ran."""
        return {int(path.name) for path in (self.directory / "marks").iterdir()}

    @property
    def restores(self) -> list[Path]:
        """The directories of restores."""
        return list((self.directory / "run").glob("restore-*"))

    @property
    def containers(self) -> list[Path]:
        """The directories of the containers of the stand-in for podman."""
        return list(self.directory.glob("containers/*"))

    def criu_options(self, mode: str = "ok") -> tuple[str, ...]:
        """Options that choose the behaviour of the stand-in."""
        return ("--marks", str(self.directory / "marks"), "--mode", mode)

    def socket(self, *, serial: bool = False) -> socket.socket:
        """A raw connection."""
        connection = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 10
        while True:
            try:
                connection.connect(str(self.serial if serial else self.stream))
                connection.settimeout(10)
                return connection
            except ConnectionRefusedError:  # bound, and not yet listening
                if time.monotonic() > deadline:
                    connection.close()
                    raise
                time.sleep(0.01)

    def connect(self, *, serial: bool = False, timeout: float = 10.0) -> LabAgent:
        """Open an authenticated session."""
        kind = Address("serial" if serial else "unix", path="test")
        link = Link(kind, self.socket(serial=serial))
        try:
            agent = LabAgent(link, timeout)
            agent.authenticate(self.secret(agent.hello.secret_at))
        except BaseException:
            link.close()
            raise
        return agent

    def secret(self, address: int) -> bytes:
        """Read the agent's secret from its memory."""
        with Path(f"/proc/{self.process.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(address + SECRET_AT)
            return memory.read(protocol.SECRET_SIZE)

    def hook(self, criu_pid: int) -> int:
        """The pid of the action script that holds the tree."""
        (hook,) = children(criu_pid, lambda words: words[-1] == str(self.program))
        return hook


def agent_program() -> Path:
    """The agent as it is built here: valgrind does not see through a static C library."""
    return build(lab=True, flags=("-O1",) if os.environ.get("OVR_VALGRIND") else None)


@contextmanager
def agent_host(directory: Path, binary: Path | None = None) -> Iterator[AgentHost]:
    """Run an agent below `directory`; it must end well.

    With ``OVR_VALGRIND`` in the environment valgrind runs it, and the action script.
    """
    valgrind = valgrind_command(directory)
    binary = binary or agent_program()
    criu = directory / "criu"
    criu.write_text((FAKE_CRIU + _RESTORING).format(python=PYTHON, valgrind=valgrind))
    criu.chmod(0o755)
    podman = directory / "podman"
    names = {"directory": str(directory), "criu": str(criu)}
    podman.write_text(_FAKE_PODMAN.format(python=PYTHON, **names))
    podman.chmod(0o755)
    (directory / "marks").mkdir()
    command = [*valgrind, binary, "--dir", directory / "run", "--criu", criu]
    command += ["--unix", directory / "stream", "--unix-serial", directory / "serial"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=_path(directory)) as process:
        assert process.stderr is not None
        assert b"ready" in process.stderr.readline()
        host = AgentHost(directory, process, binary)
        wait_for(host.serial.exists)
        try:
            yield host
        finally:
            running = process.poll() is None
            process.terminate()
            rest = process.stderr.read()
    found = [log.read_text() for log in directory.glob("valgrind-*.log") if log.stat().st_size]
    assert not found, "\n".join(found)
    assert not running or process.returncode == 0, rest.decode()


@contextmanager
def restarted(host: AgentHost) -> Iterator[None]:
    """Run the agent again, as systemd does after its death."""
    host.serial.unlink()
    command, env = host.process.args, _path(host.directory)
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=env) as process:
        assert process.stderr is not None
        assert b"ready" in process.stderr.readline()
        host.process = process
        try:
            wait_for(host.serial.exists)
            yield
        finally:
            process.terminate()
    assert process.returncode == 0


def _path(directory: Path) -> dict[str, str]:
    # The stand-ins for engines come first.
    return os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"}


def valgrind_command(directory: Path) -> list[str]:
    """Return the command of valgrind if it is asked for, else nothing."""
    if not os.environ.get("OVR_VALGRIND"):
        return []
    # Quiet: what is in the logs are errors.
    return [
        "/usr/bin/valgrind", "-q", "--leak-check=full", f"--log-file={directory}/valgrind-%p.log",
        "--errors-for-leak-kinds=definite,indirect,possible",
    ]  # fmt: skip


def wait_for(condition: Callable[[], object], patience: float = 10.0) -> None:
    """Wait until `condition()` holds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def children(pid: int, wanted: Callable[[list[str]], bool]) -> list[int]:
    """The children of a process, none that has ended, whose command line is wanted."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    words = {int(child): _words(int(child)) for child in listed}
    return [child for child, line in words.items() if line and wanted(line)]


def alive(*pids: int) -> bool:
    """Whether any of the processes may still run: no zombie, and none that exits."""
    return any(_may_run(pid) for pid in pids)


def state_of(pid: int) -> str:
    """The letter in /proc/PID/stat."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def kill(*pids: int) -> None:
    """SIGKILL, and wait: until a task is dead it goes on making its mark."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(*pids))


def begin(host: AgentHost, agent: LabAgent, **options: float) -> HeldTree:
    """Have the stand-in build a tree and hold it."""
    return agent.begin(IMAGES, criu_options=host.criu_options(), **options)


def fails(code: Code) -> pytest.RaisesExc[AttemptFailed]:
    """Expect an error of the agent's with that code."""
    return pytest.raises(AttemptFailed, check=lambda error: error.code == code)


def assert_gone(host: AgentHost, skeleton: HeldTree) -> None:
    """No task ran, none is left, and the next restore succeeds."""
    wait_for(lambda: not alive(*skeleton.tasks, skeleton.criu_pid))
    wait_for(lambda: not host.restores)
    assert not host.marks
    with host.connect() as other:
        again = begin(host, other)
        assert not host.marks
        other.go()
        wait_for(lambda: host.marks == set(again.tasks))
    kill(*again.tasks)


def hook_dies(host: AgentHost, agent: LabAgent, skeleton: HeldTree) -> None:
    """Kill the hook that holds a tree: the tree dies, and the host hears why."""
    kill(host.hook(skeleton.criu_pid))
    wait_for(lambda: not alive(*skeleton.tasks))
    with fails(Code.HOOK):
        agent.go()


def agent_dies(host: AgentHost, agent: LabAgent, skeleton: HeldTree) -> None:
    """Kill the agent that holds a tree: the tree dies with it."""
    kill(host.process.pid)
    wait_for(lambda: not alive(*skeleton.tasks, skeleton.criu_pid))
    assert not host.marks
    with pytest.raises(AgentUnreachable):
        agent.go()
    host.process.wait()


def _may_run(pid: int) -> bool:
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X") and not int(numbers[5]) & _PF_EXITING


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
        return []
