"""One round: `ovr` works on a guest, or with an agent, that lies.

It must end with a clear error or a right result within its time; must have nothing open for writing
but that VM's RAM files; what lies beside them must be untouched; no task of the tree may be left
when it failed. A guest may die of its own lies: then there is a new one.
"""

import hashlib
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ovr import lab
from ovr.errors import OvrError
from ovr.host.user_cache import user_cache
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.liar.lies import KINDS
from tests.liar.proxy import LIES, LyingAgent
from tests.vm import pool

SIZE, UMASK = 64 << 20, 0o137
LIMIT = 300.0
"""Seconds that one command may take, with a guest under TCG on a busy machine."""
GUARDS, GUARD_SIZE = 4, 1 << 20
EXIT_CODES = range(8)
DECEIVES = {"tasks", "page-tables", "btf"}
"""Kinds of lies after which a guest may have deceived itself: which frames are a task's, and where
in an object a field is, only the guest can know."""
WHAT = (*KINDS, "agent")


@dataclass
class Watch:
    """Files that a process has open for writing, sampled often.

    Attributes:
        allowed: files that it may have open.
        below: directories in which it may have files open.
        seen: what else it had.
    """

    allowed: set[str]
    below: tuple[str, ...]
    seen: set[str] = field(default_factory=set)

    def look(self, pid: int) -> None:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                words = line.split(maxsplit=5)
                if words[1].startswith("rw") and words[1].endswith("s"):
                    self._judge(words[5] if len(words) > 5 else "(nameless)")
        with suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    where = str(fd.readlink())
                    flags = Path(f"/proc/{pid}/fdinfo/{fd.name}").read_text()
                    mode = int(re.search(r"flags:\t(\d+)", flags)[1], 8)  # type: ignore[index]
                    if mode & os.O_ACCMODE and where.startswith("/"):
                        self._judge(where)

    def _judge(self, path: str) -> None:
        # The second is anonymous memory, shared with the process that holds the VM: no file.
        fine = (str(user_cache()), "/dev/zero (deleted)", "/dev/null", *self.below)
        compiled = "/__pycache__/" in path  # by Python, of a module that nobody has loaded before
        if path not in self.allowed and not path.startswith(fine) and not compiled:
            self.seen.add(path)


@dataclass
class Outcome:
    """How a round ended: `wrong` is empty if it ended well."""

    text: str
    wrong: str = ""


@dataclass(frozen=True)
class Subject:
    """A restore's input: images in `images`, of a tree whose root has the pid `pid`.

    Attributes:
        name: one of the pool, or empty: the demo's workload.
    """

    name: str
    images: Path
    pid: int

    @property
    def comm(self) -> str:
        """The name of its processes."""
        return f"pool-{self.name}" if self.name else "ovr-workload"

    @classmethod
    def dumped(cls, name: str, vm: lab.LabVm, share: Path) -> "Subject":
        """One that is made in a VM and dumped into its shared directory."""
        images = share / (name or "workload")
        images.mkdir()
        where = f"{SHARE}/{images.name}"
        if name:
            program = pool.BY_NAME[name]
            pool.install(vm, program)
            pid = pool.start(vm, program)
            pool.dump(vm, program, pid, where)
        else:
            pid = demo.start_workload(vm, SIZE, UMASK)
            demo.dump_workload(vm, pid, where)
        return cls(name, images, pid)

    def prepare(self, vm: lab.LabVm) -> None:
        """Give the guest what a restore needs."""
        if self.name:
            pool.install(vm, pool.BY_NAME[self.name])
        else:
            demo.prepare(vm)

    def right(self, vm: lab.LabVm) -> bool:
        """Whether the restored tree finds itself whole."""
        if self.name:
            return bool(pool.ask(vm, pool.BY_NAME[self.name])["ok"])
        answer = demo.answer_of(vm, self.pid)
        return answer.words > 0 and answer.wrong == 0 and int(answer.umask, 8) == UMASK


SUBJECTS = ("", "memfd", "cow")


class Liar:
    """A guest that lies, and another when it has died of that; a context manager.

    Args:
        name: of the VM.
        subjects: what is restored.
        scratch: a directory for the sockets of lying agents, and what a restore leaves.
        vm: a guest to begin with; its owner ends it.
    """

    def __init__(
        self, name: str, subjects: Sequence[Subject], scratch: Path, vm: lab.LabVm | None = None
    ) -> None:
        self.name, self.subjects, self.scratch = name, subjects, scratch
        self.vm, self.died = vm, 0
        self._guards: dict[Path, bytes] = {}
        self._sums = {subject: _sums(subject.images) for subject in subjects}
        if vm:
            self._furnish()

    def __enter__(self) -> "Liar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.vm is not None and self.vm.name == self.name:
            self.vm.down()
        for guard in self._guards:
            guard.unlink(missing_ok=True)

    def round(self, what: str, seed: str) -> Outcome:
        """Have `ovr` do something while `what` is lied about."""
        chance = random.Random(seed)
        vm, subject = self._living(), chance.choice(self.subjects)
        command = ["restore", "-D", str(subject.images), "-W", str(self.scratch)]
        if what != "agent" and chance.random() < 0.2:
            command = [chance.choice(["ps", "check"])]
        with ExitStack() as stack:
            if what == "agent":
                lie = chance.choice(LIES)
                where = self.scratch / "liar"
                where.unlink(missing_ok=True)
                stack.enter_context(LyingAgent(vm.agent, where, lie, seed))
                command += ["--agent", f"unix:{where}:1"]
            else:
                lie = what
                stack.callback(_end, self._lies(what, seed, subject))
            code, said, watch = self._run([*command, "--vm", f"lab:{vm.name}"])
        text = f"{command[0]} {subject.name}, {lie}: "
        text += f"exit {code}: {said}" if code else "done"
        restored = command[0] == "restore" and code == 0
        wrong = [self._judge(code, said, watch, subject)]
        wrong.append(self._judge_guest(subject, restored, what in DECEIVES))
        return Outcome(text, ", ".join(filter(None, wrong)))

    def _lies(self, what: str, seed: str, subject: Subject) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.liar.lies", f"lab:{self._living().name}", what]
        liar = subprocess.Popen(
            [*command, seed, str(subject.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert liar.stdout is not None
        assert liar.stdout.readline() == b"ready\n"
        return liar

    def _run(self, command: list[str]) -> tuple[int, str, Watch]:
        watch = Watch({str(path) for path in self._living().ram}, (str(self.scratch),))
        with subprocess.Popen(
            [sys.executable, "-m", "ovr", *command], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace",
        ) as ovr:  # fmt: skip
            printed: list[str] = []
            said: list[str] = []
            readers = [
                threading.Thread(target=words.extend, args=(stream,))
                for words, stream in ((printed, ovr.stdout), (said, ovr.stderr))
            ]
            for reader in readers:
                reader.start()
            deadline = time.monotonic() + LIMIT
            while ovr.poll() is None and time.monotonic() < deadline:
                watch.look(ovr.pid)
                time.sleep(0.02)
            if ovr.poll() is None:
                ovr.kill()
                said.append(f"it took more than {LIMIT:g} s")
            for reader in readers:
                reader.join()
        # Findings of `ovr check` are its result, not errors.
        words = said or (printed if command[0] == "check" else [])
        return ovr.returncode, " ".join("".join(words).split()), watch

    def _judge(self, code: int, said: str, watch: Watch, subject: Subject) -> str:
        changed = [path for path, was in self._guards.items() if path.read_bytes() != was]
        wrong = {
            f"it hung or crashed: {code}": code not in EXIT_CODES,
            "an error that is none of ours": "Traceback" in said,
            "an error without a word": code and not said,
            "it met no lie: QMP was taken": "no other client connected" in said,
            f"open for writing: {sorted(watch.seen)}": watch.seen,
            f"it wrote to {changed}": changed,
            "the images have changed": _sums(subject.images) != self._sums[subject],
        }
        return ", ".join(what for what, so in wrong.items() if so)

    def _judge_guest(self, subject: Subject, restored: bool, may_be_wrong: bool) -> str:
        if not self._answers():
            return ""
        vm, wrong = self._living(), ""
        try:  # a guest may die of the lies only now
            if not restored and not gone(vm, subject.comm):
                wrong = "tasks of a failed restore are left"
            elif restored and not subject.right(vm) and not may_be_wrong:
                wrong = "what was restored is wrong"
        except (OvrError, AssertionError) as error:
            wrong = str(error) if self._answers() and not may_be_wrong else ""
        if self.vm is not None:
            with suppress(OvrError):
                vm.sh(f"pkill -9 -x {subject.comm}")
                gone(vm, subject.comm)
        return wrong

    # ------------------------------------------------------------------------ the guest

    def _living(self) -> lab.LabVm:
        if self.vm is None:
            self.vm = lab.up(self.name, memory="1G")
            self._furnish()
        return self.vm

    def _answers(self) -> bool:
        """Whether the guest lives; if not, it is ended."""
        assert self.vm is not None
        try:
            if self.vm.alive and self.vm.sh("true", timeout=60).status == 0:
                return True
        except OvrError:
            pass
        self.died += 1
        self.vm.down()
        self.vm, self._guards = None, {}
        return False

    def _furnish(self) -> None:
        # Files that the subjects need, and files beside the VM's own, which no restore may touch.
        assert self.vm is not None
        for subject in self.subjects:
            subject.prepare(self.vm)
        for number in range(GUARDS):
            path = self.vm.console.with_name(f"guard-{number}")
            self._guards[path] = os.urandom(GUARD_SIZE)
            path.write_bytes(self._guards[path])


def _end(liar: subprocess.Popen[bytes]) -> None:
    assert liar.stdin is not None
    assert liar.stdout is not None
    liar.stdin.close()
    try:
        liar.wait(30)
    except subprocess.TimeoutExpired:
        liar.kill()
        liar.wait()
    liar.stdout.close()


def gone(vm: lab.LabVm, comm: str) -> bool:
    """Wait for the last process of a name to end: the agent may have to miss the host itself."""
    wait = f"for i in $(seq 300); do pgrep -x {comm} || exit 0; sleep 0.1; done; exit 1"
    return vm.sh(wait, timeout=120).status == 0


def _sums(images: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in images.iterdir()}
