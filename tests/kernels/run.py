"""One setup: programs of the pool start in a VM, CRIU dumps them, and they come back from outside.

They are restored into the VM that they were dumped in: one boot a setup. `tests/vm/test_pool.py`
has two VMs, for the suites' own kernels.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import ovr
from ovr import lab
from ovr.errors import CheckFailed, OvrError
from ovr.lab import demo
from ovr.lab.ram import memory_size
from ovr.lab.share import SHARE
from tests.kernels.setups import Setup
from tests.stress.guest import TROUBLE
from tests.vm import pool

__all__ = ["REFUSED", "RESTORED", "Outcome", "run"]

RESTORED, REFUSED = "restored", "refused"
POOL = Path("/proc/sys/vm/nr_hugepages")
HUGE_PAGE = 2 << 20


@dataclass
class Outcome:
    """The result of a setup.

    Attributes:
        kernel: the guest's ``uname -r``; "" if it did not boot.
        criu: the version of its CRIU.
        programs: by name `RESTORED`, or what went wrong.
        without_ovr: programs that CRIU alone cannot dump or restore on that guest either.
        trouble: why there is nothing else to say, or what the guest's kernel complained of.
    """

    kernel: str = ""
    criu: str = ""
    programs: dict[str, str] = field(default_factory=dict)
    without_ovr: list[str] = field(default_factory=list)
    trouble: str = ""

    @property
    def failed(self) -> bool:
        """Whether something went wrong that CRIU alone does not get wrong, too."""
        wrong = {name for name, said in self.programs.items() if said != RESTORED}
        return bool(self.trouble or not self.programs or wrong - {*self.without_ovr})


def run(
    name: str,
    setup: Setup,
    programs: Sequence[pool.Program],
    scratch: Path,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Run programs on a setup, in a VM of this name; images are made in `scratch`.

    Raises:
        OvrError: the VM does not come up.
    """
    outcome = Outcome()
    with (
        huge_pages(setup),
        demo.lab_vm(
            name, suite=setup.suite, kernel=setup.kernel, memory=setup.memory, share=scratch,
            **setup.hardware,
        ) as vm,
    ):  # fmt: skip
        outcome.kernel = vm.sh("uname -r").stdout.decode().strip()
        outcome.criu = vm.sh("criu --version | sed -n 's/^Version: //p'").stdout.decode().strip()
        say(f"Linux {outcome.kernel}, CRIU {outcome.criu}")
        if setup.refused:
            outcome.trouble = _refusal(vm)
            return outcome
        for program in programs:
            _one(vm, program, scratch, outcome)
            say(f"{program.name}: {outcome.programs[program.name]}")
            if not vm.alive:
                outcome.trouble = "the guest died: " + _last_words(vm)
                break
        else:
            outcome.trouble = vm.sh(f"dmesg | grep -E '{TROUBLE}'").stdout.decode(errors="replace")
    return outcome


def _refusal(vm: lab.LabVm) -> str:
    # Of `ovr check`: on kernels so old CRIU cannot dump what there would be to restore.
    command = [sys.executable, "-m", "ovr", "check", "--vm", f"lab:{vm.name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()]
    wrong = [": ".join(words[1:]) for words in lines if words[0] == "FAIL"]
    return f"{REFUSED}: {wrong[0]}" if done.returncode and wrong else ""


def _one(vm: lab.LabVm, program: pool.Program, scratch: Path, outcome: Outcome) -> None:
    images = scratch / program.name
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    try:
        pool.install(vm, program)
        pid = pool.start(vm, program)
        # A slow guest may take longer than CRIU's own 10 s to stop.
        patient = replace(program, dump_options=(*program.dump_options, "--timeout", "600"))
        try:
            pool.dump(vm, patient, pid, f"{SHARE}/{program.name}")
        except AssertionError as error:
            outcome.without_ovr.append(program.name)
            outcome.programs[program.name] = f"CRIU cannot dump it: {_cause(error)}"
            return
        outcome.programs[program.name] = said = _restored(vm, program, images)
        if said != RESTORED and vm.alive:
            pool.end(vm, program)
            if not _criu_can(vm, program):
                outcome.without_ovr.append(program.name)
    except (AssertionError, OvrError) as error:
        outcome.programs[program.name] = _cause(error)
    finally:
        if vm.alive:
            pool.end(vm, program)
        shutil.rmtree(images, ignore_errors=True)


def _restored(vm: lab.LabVm, program: pool.Program, images: Path) -> str:
    try:
        with ovr.attach(f"lab:{vm.name}") as attached:
            attached.restore(images, criu_options=program.restore_options)
        answer = pool.ask(vm, program)
    except CheckFailed as error:
        return f"{REFUSED}: {error}"
    except (AssertionError, OvrError) as error:
        return _cause(error)
    if answer["ok"] and answer["checks"] > 0:
        return RESTORED
    return f"it finds itself changed: {answer['wrong']}"


def _criu_can(vm: lab.LabVm, program: pool.Program) -> bool:
    try:
        pool.restore_plain(vm, program, f"{SHARE}/{program.name}")
        return bool(pool.ask(vm, program)["ok"])
    except AssertionError:
        return False


def _cause(error: Exception) -> str:
    # CRIU's first line with "Error", or the message.
    text = str(error).strip() or repr(error)
    found = re.search(r"Error \([^)]*\): .*", text)
    return (found[0] if found else text.splitlines()[0])[:200]


def _last_words(vm: lab.LabVm) -> str:
    lines = vm.console.read_text(errors="replace").splitlines()
    return next((line for line in lines if re.search(TROUBLE, line)), lines[-1] if lines else "")


@contextmanager
def huge_pages(setup: Setup) -> Iterator[None]:
    """Reserve the huge pages that the setup's VM needs on the host, and give them back."""
    if setup.hardware.get("backend") != "hugetlbfs":
        yield
        return
    before = int(POOL.read_text())
    wanted = before + memory_size(setup.memory) // HUGE_PAGE
    POOL.write_text(str(wanted))
    try:
        yield
    finally:
        POOL.write_text(str(before))
