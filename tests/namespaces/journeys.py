"""One suite's journeys: each case dumped in one VM; in another CRIU alone restores it, then ovr."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ovr
from ovr import lab
from ovr.lab import demo
from ovr.lab.share import SHARE
from tests.vm import pool

PACKAGES = ("iptables",)
"""CRIU looks for rules in a network namespace with it."""
MEMORY = "1G"
_CAUSE = re.compile(r"Error \(.*")


@dataclass(frozen=True)
class Case:
    """A program of the pool, in some namespaces."""

    flavour: str
    program: pool.Program

    @property
    def name(self) -> str:
        """The directory of its images in the share."""
        return f"{self.flavour}-{self.program.name}".replace("+", "-")


@dataclass(frozen=True)
class Outcome:
    """How a case went: empty where it went well, else the reason; None where it was not tried."""

    dump: str | None = None
    criu: str | None = None
    ovr: str | None = None


def journeys(
    suite: str, cases: Sequence[Case], share: Path, prefix: str
) -> Iterator[tuple[str, Outcome]]:
    """Yield the name of each case and how it went, as soon as it is known."""
    found: dict[str, str] = {}
    guest = {"suite": suite, "memory": MEMORY, "share": share, "packages": PACKAGES}
    with demo.lab_vm(f"{prefix}a", **guest) as vm:
        for case in cases:
            found[case.name] = _tried(vm, case, lambda vm, case: _dump(vm, case, share))
            if found[case.name]:
                yield case.name, Outcome(dump=found[case.name])
    with demo.lab_vm(f"{prefix}b", **guest) as vm:
        for case in cases:
            if not found[case.name]:
                alone = _tried(vm, case, _restore_alone)
                outside = _tried(vm, case, lambda vm, case: _restore_outside(vm, case, share))
                yield case.name, Outcome("", alone, outside)


def _tried(vm: lab.LabVm, case: Case, job: Callable[[lab.LabVm, Case], None]) -> str:
    # All that may be wrong with a restore is a finding, whatever its class.
    try:
        job(vm, case)
    except (AssertionError, ovr.OvrError) as error:
        text = str(error)
        causes = _CAUSE.findall(text)
        return (causes or text.splitlines() or [repr(error)])[0][:300]
    finally:
        pool.end(vm, case.program)
    return ""


def _dump(vm: lab.LabVm, case: Case, share: Path) -> None:
    pool.install(vm, case.program)
    pid = pool.start(vm, case.program)
    (share / case.name).mkdir(exist_ok=True)
    pool.dump(vm, case.program, pid, f"{SHARE}/{case.name}")


def _restore_alone(vm: lab.LabVm, case: Case) -> None:
    pool.install(vm, case.program)
    pool.restore_plain(vm, case.program, f"{SHARE}/{case.name}")
    _ask(vm, case)


def _restore_outside(vm: lab.LabVm, case: Case, share: Path) -> None:
    pool.install(vm, case.program)
    with ovr.attach(f"lab:{vm.name}") as attached:
        options = case.program.restore_options
        attached.restore(share / case.name, criu_options=options, verify="full")
    _ask(vm, case)


def _ask(vm: lab.LabVm, case: Case) -> None:
    for _ in range(2):
        answer = pool.ask(vm, case.program)
        assert answer["ok"], answer["wrong"]
        assert answer["checks"] > 0
