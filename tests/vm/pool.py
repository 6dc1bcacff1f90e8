"""The pool: self-checking programs (`programs/pool/*.c`), how each is started and asked.

A fresh VM needs `install` before a restore: the program's file, its directory with the files it
maps, and what its kernel must have. See `programs/pool/check.h` for what a program does.
"""

import hashlib
import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ovr import lab
from ovr.lab.agent import Completed
from ovr.lab.cache import digest
from ovr.lab.workload import build_workload

SOURCES = Path(__file__).parent / "programs" / "pool"
ENTERING = SOURCES.parent / "namespaces" / "enter.c"
COMMON = ("check.c", "pages.c", "surroundings.c")
HEADERS = ("check.h", "rseq.h")
DIRECTORY = "/var/lib/ovr-pool"
ENTER = "/usr/local/bin/pool-enter"
ROOT = f"{DIRECTORY}/root"  # as in programs/namespaces/enter.c
MAPPED = 100_000
FIRST_PID = 23_000
PIDS_EACH = 500
POLL = 0.3  # seconds
PATIENCE = 240.0  # seconds; a guest under TCG on a busy host is slow


@dataclass(frozen=True)
class Program:
    """One of the pool.

    Attributes:
        name: of the program.
        number: its place in `POOL`, which makes its pids.
        tree: whether it is more than one process.
        shared: whether it has shared memory.
        namespaces: those of its own, in the words of `programs/namespaces/enter.c`.
        launcher: what runs it: `unshare` and its options.
        setup: shell for the guest, before a start or a restore.
        dump_options: for `criu dump`, besides the usual.
        restore_options: for `criu restore`, besides the usual.
        source: without ``.c``, from `SOURCES`, if it is not called like the program.
        args: for the program after its directory, by suite; "" is any other suite.
        unsupported: suites whose CRIU cannot dump or restore it, and why.
    """

    name: str
    number: int
    tree: bool = False
    shared: bool = False
    namespaces: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    setup: str = "true"
    dump_options: tuple[str, ...] = ()
    restore_options: tuple[str, ...] = ()
    source: str = ""
    args: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The path of the program in the guest."""
        return f"/usr/local/bin/pool-{self.name}"

    @property
    def directory(self) -> str:
        """Its DIR in the guest."""
        return f"{DIRECTORY}/{self.name}"

    @property
    def forks(self) -> int:
        """How many processes it takes to start it, besides itself."""
        return 2 if self.namespaces else int("--fork" in self.launcher)

    @property
    def first_pid(self) -> int:
        """The pid that its first process gets; no freshly booted guest has given it away."""
        return FIRST_PID + PIDS_EACH * self.number

    def arguments(self, suite: str) -> tuple[str, ...]:
        """Return its arguments after its directory."""
        return self.args.get(suite, self.args.get("", ()))


@dataclass(frozen=True)
class Target:
    """A place that may be sabotaged.

    Attributes:
        pid: of the process, as it sees it.
        address: GVA of a byte.
        what: what it belongs to.
        once: whether the sabotage cannot be taken back.
    """

    pid: int
    address: int
    what: str
    once: bool


def within(program: Program, *words: str) -> Program:
    """Return the same program in namespaces made by hand, which checks what it sees of them.

    Args:
        program: one that runs in the namespaces of the VM.
        words: the namespaces: cgroup, ipc, mount, net, pid, time, user, uts.
    """
    setup, options = [program.setup], list(program.restore_options)
    if "mount" in words:
        options += ["--root", ROOT]
    if "user" in words:
        setup.append(f"chown -R {MAPPED}:{MAPPED} {program.directory}")
    suites = {"", *program.args}
    own = [f"own-{word}" for word in words]
    args = {one: (*program.arguments(one), "surroundings", *own) for one in suites}
    launcher = (ENTER, *words, "--")
    return replace(
        program, namespaces=words, launcher=launcher, setup=" && ".join(setup),
        restore_options=tuple(options), args=args,
    )  # fmt: skip


def install_namespaces(vm: lab.LabVm) -> None:
    """Give the guest what namespaces are made with, and a root file system for them."""
    vm.put(build_workload(ENTERING, "-std=gnu11", "-D_GNU_SOURCE"), ENTER, 0o755)
    _must(vm, _NEW_ROOT)


def build(program: Program) -> Path:
    """Compile it, once for each content of its sources."""
    shared = [SOURCES / name for name in COMMON]
    content = digest(*((SOURCES / name).read_bytes() for name in (*COMMON, *HEADERS)))
    flags = ("-std=gnu11", "-D_GNU_SOURCE", "-pthread", f"-I{SOURCES}", f"-DCOMMON={content}")
    return build_workload(
        SOURCES / f"{program.source or program.name}.c", *flags, *map(str, shared)
    )


def install(vm: lab.LabVm, program: Program) -> None:
    """Give the guest all that it needs to start or restore the program."""
    binary = build(program)
    there = vm.sh(f"sha256sum {program.path}").stdout.decode()
    if not there.startswith(hashlib.sha256(binary.read_bytes()).hexdigest()):
        vm.put(binary, program.path, 0o755)
    if program.namespaces:
        install_namespaces(vm)
    command = f"mkdir -p {program.directory} && {program.path} --prepare {program.directory}"
    _must(vm, f"{command} && {program.setup}")


def start(vm: lab.LabVm, program: Program) -> int:
    """Start it and return its root's pid in the VM, once all is set up."""
    directory = program.directory
    vm.sh(f"rm -f {directory}/ready {directory}/died {directory}/answer {directory}/targets")
    first = program.first_pid - 1 - program.forks
    vm.sh(f"echo {first} > /proc/sys/kernel/ns_last_pid")
    with vm.connect() as agent:
        command = [*program.launcher, program.path, directory, *program.arguments(vm.suite)]
        agent.spawn(command)
    _wait_for(vm, program, "ready")
    return root_pid(vm, program)


def dump(vm: lab.LabVm, program: Program, pid: int, directory: str) -> None:
    """Have CRIU dump the tree into a directory of the guest, which ends it."""
    options = " ".join(program.dump_options)
    command = f"criu dump -t {pid} -D {directory} -v2 -o dump.log {options}"
    done = vm.sh(f"{command} && sync", timeout=600)
    assert done.status == 0, _errors(vm, f"{directory}/dump.log", done)
    _wait_until_gone(vm, program)


def restore_plain(vm: lab.LabVm, program: Program, directory: str) -> None:
    """Have CRIU alone restore it, from a copy: it reads page by page, too slow on the share."""
    copy = f"/var/tmp/pool-{program.name}"
    _must(vm, f"rm -rf {copy} && cp -r {directory} {copy}")
    options = " ".join(program.restore_options)
    done = vm.sh(f"criu restore -d -D {copy} -v2 -o restore.log {options}", timeout=600)
    assert done.status == 0, _errors(vm, f"{copy}/restore.log", done)
    _must(vm, f"rm -rf {copy}")


def ask(vm: lab.LabVm, program: Program) -> dict[str, Any]:
    """Have the whole tree check itself, work and check again; return what it says."""
    pid = root_pid(vm, program)
    vm.sh(f"rm -f {program.directory}/answer; kill -USR1 {pid}")
    answer: dict[str, Any] = json.loads(_wait_for(vm, program, "answer"))
    return answer


def end(vm: lab.LabVm, program: Program) -> None:
    """Kill all of the tree, and wait until it is gone."""
    _must(vm, f"pkill -9 -x pool-{program.name}; true")
    _wait_until_gone(vm, program)


def processes(vm: lab.LabVm, program: Program) -> dict[int, tuple[int, int]]:
    """Return its processes by pid: parent, and pid in the innermost namespace."""
    listing = vm.sh(
        f"for p in $(find /proc -maxdepth 2 -path '/proc/[0-9]*/exe' -lname {program.path} "
        "-printf '%h\\n' 2>/dev/null); do grep -h -e ^Pid: -e ^PPid: -e ^NSpid: $p/status; done",
        timeout=PATIENCE,
    ).stdout.decode()
    found = re.findall(r"^Pid:\t(\d+)\nPPid:\t(\d+)\nNSpid:.*\t(\d+)$", listing, re.MULTILINE)
    return {int(pid): (int(parent), int(inner)) for pid, parent, inner in found}


def root_pid(vm: lab.LabVm, program: Program) -> int:
    """Return the pid, in the VM, of the one process whose parent is not of the program."""
    running = processes(vm, program)
    roots = [pid for pid, (parent, _) in running.items() if parent not in running]
    assert len(roots) == 1, f"{program.name}: roots {roots} among {sorted(running)}"
    return roots[0]


def targets(vm: lab.LabVm, program: Program) -> list[Target]:
    """Return the places that the program offers for sabotage."""
    lines = _wait_for(vm, program, "targets").splitlines()
    words = [line.split(maxsplit=2) for line in lines]
    return [
        Target(int(pid), int(address, 16), what.lstrip("!"), what.startswith("!"))
        for pid, address, what in words
    ]


def poke(vm: lab.LabVm, program: Program, target: Target) -> None:
    """Invert a byte of the running program behind its back; twice is as if never."""
    inner = {inner: pid for pid, (_, inner) in processes(vm, program).items()}
    _must(vm, f"{program.path} --poke {inner[target.pid]} {target.address:#x}")


def _must(vm: lab.LabVm, command: str) -> None:
    done = vm.sh(command, timeout=PATIENCE)
    assert done.status == 0, f"{command}: {done.stderr.decode(errors='replace')}"


def _wait_for(vm: lab.LabVm, program: Program, name: str) -> str:
    """Return what a file of the program says, once it is there."""
    deadline = time.monotonic() + PATIENCE
    look = f"cd {program.directory}; cat {name} 2>/dev/null || ! cat died >&2"
    with vm.connect() as agent:
        while time.monotonic() < deadline:
            done = agent.run(["/bin/sh", "-c", look])
            if done.status == 0 and done.stdout:
                return done.stdout.decode()
            died = done.stderr.decode(errors="replace")
            assert "No such file" in died, f"{program.name}: {died}"
            time.sleep(POLL)
    raise AssertionError(f"no {program.directory}/{name} in {vm.name}")


def _wait_until_gone(vm: lab.LabVm, program: Program) -> None:
    running = f"pgrep -x pool-{program.name} >/dev/null"
    _must(vm, f"for i in $(seq 600); do {running} || exit 0; sleep 0.1; done; exit 1")


def _errors(vm: lab.LabVm, log: str, done: Completed) -> str:
    tail = vm.sh(f"grep -B3 Error {log} | tail -n 25; echo ...; tail -n 5 {log}").stdout
    return (done.stdout + done.stderr + tail).decode(errors="replace")


# The VM's own, without what is mounted in it, and with the devices that a program needs.
_NEW_ROOT = f"""
    set -e; mkdir -p {ROOT}; mountpoint -q {ROOT} || mount --bind / {ROOT}
    cd {ROOT}/dev; mkdir -p pts; ln -sf pts/ptmx ptmx
    for device in null:3 zero:5 urandom:9; do
        test -e ${{device%:*}} || mknod -m 666 ${{device%:*}} c 1 ${{device#*:}}
    done
"""
HUGE_PAGES = "echo 24 > /proc/sys/vm/nr_hugepages && grep -qx 24 /proc/sys/vm/nr_hugepages"
SOCKETS = {"bookworm": "CRIU 3.17.1 sets SO_MARK in the user namespace, where it is not permitted"}
POOL: tuple[Program, ...] = (
    Program("private", 0),
    Program("threads", 1),
    Program("cow", 2, tree=True),
    Program("shared", 3, tree=True, shared=True),
    Program("tree", 4, tree=True),
    Program(
        "pidns",
        5,
        tree=True,
        source="tree",
        launcher=("unshare", "--pid", "--fork"),
    ),
    Program("prefork", 6, tree=True),
    Program("smallvmas", 7),
    Program("stacks", 8),
    # WIPEONFORK, MADV_GUARD_INSTALL and MAP_DROPPABLE came with CRIU 4.2, guards with Linux 6.13;
    # older CRIUs drop the flag, or do not know of it (checkpoint-restore/criu #2652, #2659).
    Program("special", 9, args={"forky": ("wipe", "guard", "droppable")}),
    Program("memfd", 10, tree=True, shared=True),
    Program("sysv", 11, tree=True, shared=True, launcher=("unshare", "--ipc")),
    Program("hugetlb", 12, tree=True, shared=True, setup=HUGE_PAGES),
    Program("stress", 13, tree=True),
    within(
        Program("userns", 14, tree=True, shared=True, source="shared", unsupported=SOCKETS),
        "user", "pid", "mount", "ipc", "uts", "time", "cgroup",
    ),
    within(
        Program("nested", 15, tree=True, source="../namespaces/nested", unsupported=SOCKETS),
        "user", "pid", "mount", "ipc", "uts",
    ),
)  # fmt: skip
BY_NAME = {program.name: program for program in POOL}
