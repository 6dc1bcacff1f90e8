"""Kill processes that take part in a move, and check that exactly one tree is left."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ovr
from ovr import lab
from ovr.attempt.attempt import Attempt as Bracket
from ovr.errors import AgentUnreachable, AttemptFailed, CheckFailed
from ovr.move.decide import decide
from tests import subject
from tests.kill import check
from tests.kill.attempt import MOVE, Attempt, events_of, kind_of, perform
from tests.kill.place import Place
from tests.kill.steps import Point

__all__ = ["MoveRange"]

SIZE = 8 << 20
ALL = 2  # processes of the tree
A_WHILE = 0.5  # seconds in which what runs marks that it does, many times
PATIENCE = 60.0
DAMAGED = "may not run as before"
IN_DOUBT = "failed MoveInDoubt"
PREPARED = "after a sending prepare"
HEARD = "after a hearing the agent"


class MoveRange(Place):
    """Two VMs; a tree is moved from the first to the second.

    Args:
        boots: boot one VM each.
        scratch: a directory for this run.
    """

    story = MOVE

    def __init__(self, boots: Sequence[Callable[[], lab.LabVm]], scratch: Path) -> None:
        super().__init__(boots, scratch)
        self._frozen_and_forgotten = False

    def command(self) -> list[str]:
        """Start a tree in the first VM, and return the command of its move to the second."""
        for vm in self.vms:
            subject.end(vm)
        source, destination = self.vms
        pid = subject.start(source, SIZE)
        return ["tests.kill.mover", f"lab:{source.name}", f"lab:{destination.name}", str(pid)]

    def shoot(self, victim: str, point: Point) -> str:
        command = self.command()
        source, destination = vms = self.vms
        self._frozen_and_forgotten = False

        def forget(attempt: Attempt) -> None:
            if prepared(attempt):
                subject.forget_marks(source)
                self._frozen_and_forgotten = True

        attempt, met = perform(vms, command, victim, point, self.temporary, before=forget)
        try:
            became = self._after(source, destination, victim, attempt)
        finally:
            attempt.close()
        self._next_move()
        return became if met else f"{became}; nobody to kill"

    def _next_move(self) -> None:
        events_of(self.command(), self.temporary)
        source, destination = self.vms
        assert gone(check.once_quiet(source)), "the tree runs in both VMs"
        check.once_quiet(destination)
        check.restored(destination, SIZE)
        assert not list(self.temporary.iterdir()), "temporary files of a killed move are left"

    def _after(
        self, source: lab.LabVm, destination: lab.LabVm, victim: str, attempt: Attempt
    ) -> str:
        said = check.said(victim, attempt)
        for vm in (source, destination):
            check.not_held(vm)
        if said != "killed":  # else the next move removes them
            check.no_files(self.temporary)
        for vm, side in ((source, "a"), (destination, "b")):
            assert vm.alive or victim == f"qemu-{side}", f"the VM {side} is dead"
        if not source.alive:
            return self._without_source(destination, attempt, said)
        if not destination.alive:
            return self._without_destination(source, attempt, said)
        seen = check.once_quiet(destination)
        moves = doubts_or_quiet(source)
        arrived = self._arrived(destination, attempt, seen, kind_of(victim))
        if moves:
            assert said == "killed" or said.startswith(IN_DOUBT), f"{moves} is in doubt: {said}"
            return self._decided(source, destination, arrived=arrived)
        if arrived:
            assert said in ("done", "killed"), said
            self._ended(source)
            return "runs in B"
        assert said != "done", "there is no tree"
        return self._runs_on(source, victim, said)

    def _arrived(self, vm: lab.LabVm, attempt: Attempt, seen: dict[str, int], kind: str) -> bool:
        """Whether the tree runs in the destination: all of it, or it never ran."""
        alive, marks = seen["subjects"], subject.marks(seen)
        if alive:
            assert alive == ALL, f"{alive} of {ALL} processes run in B"
            assert sent_go(attempt), "the tree runs in B, and nobody said so"
            check.restored(vm, SIZE)
            return True
        assert not marks, f"{marks} ran in B, and are gone"
        return False

    def _ended(self, vm: lab.LabVm) -> None:
        seen = check.once_quiet(vm)
        assert gone(seen), "the tree runs in both VMs"
        if self._frozen_and_forgotten:
            assert not subject.marks(seen), "the tree ran in both VMs"

    def _runs_on(self, vm: lab.LabVm, victim: str, said: str) -> str:
        seen = check.once_quiet(vm)
        try:
            assert seen["subjects"] == ALL, f"{seen['subjects']} of {ALL} processes run in A"
            check.runs_on(vm)
        except AssertionError as error:
            # CRIU's parasite code was in it.
            if victim == "criu-a" and DAMAGED in said:
                return f"damaged in A, and reported: {error}"
            raise
        return "runs on in A" + (", reported as damaged" if DAMAGED in said else "")

    def _decided(self, source: lab.LabVm, destination: lab.LabVm, *, arrived: bool) -> str:
        """Decide the move by what the destination says, and check that there is one tree."""
        self._frozen(source)
        finished, note = decided(source, destination)
        assert finished == arrived, f"finished: {finished}, runs in B: {arrived}"
        if finished:
            self._ended(source)
            check.once_quiet(destination)
            check.runs_on(destination)
            return "in doubt, finished"
        self._back(source)
        assert gone(check.once_quiet(destination)), "the tree runs in both VMs"
        return f"in doubt, taken back{note}"

    def _frozen(self, vm: lab.LabVm) -> None:
        if self._frozen_and_forgotten:
            assert not subject.marks(subject.look(vm)), "a frozen tree ran"
        subject.forget_marks(vm)
        time.sleep(A_WHILE)
        seen = subject.look(vm)
        assert seen["subjects"] == ALL, f"{seen['subjects']} of {ALL} processes are frozen in A"
        assert not subject.marks(seen), f"{subject.marks(seen)} run, and are in doubt"

    def _back(self, vm: lab.LabVm) -> None:
        seen = check.once_quiet(vm)
        assert seen["subjects"] == ALL, f"{seen['subjects']} of {ALL} processes run in A"
        check.runs_on(vm)

    def _without_source(self, destination: lab.LabVm, attempt: Attempt, said: str) -> str:
        seen = check.once_quiet(destination)
        if self._arrived(destination, attempt, seen, "qemu"):
            return f"runs in B; {said[:40]}"
        assert said != "done", "there is no tree"
        return f"lost with A; {said[:40]}"

    def _without_destination(self, source: lab.LabVm, attempt: Attempt, said: str) -> str:
        if doubts_or_quiet(source):
            assert said.startswith(IN_DOUBT), said
            self._frozen(source)
            _, note = decided(source, None)
            self._back(source)
            return f"in doubt, taken back{note}"
        if said == "done" or attempt.events[-1].name == "end of commit":
            self._ended(source)
            return "lost with B"
        return self._runs_on(source, "qemu-b", said)


def prepared(attempt: Attempt) -> bool:
    """Whether the agent has answered that the tree in the source is prepared."""
    names = [event.name for event in attempt.events]
    return PREPARED in names and HEARD in names[names.index(PREPARED) :]


def sent_go(attempt: Attempt) -> bool:
    """Whether the destination may have been told to let the tree run."""
    return any(event.name == "before b sending go" for event in attempt.events)


def gone(seen: dict[str, int]) -> bool:
    """Whether nothing of the tree is there."""
    return not seen["subjects"]


def doubts_or_quiet(vm: lab.LabVm) -> tuple[str, ...]:
    """Wait until moves are in doubt, and return them; or until nothing is left of one."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            seen = subject.look(vm)
            if check.is_quiet(seen):
                return ()
            with ovr.attach(f"lab:{vm.name}") as attached, Bracket(attached) as bracket:
                if found := bracket.agent.doubts():
                    return found
        except (AgentUnreachable, AttemptFailed):
            seen = {}
        time.sleep(0.2)
    raise AssertionError(f"something of the move is left in {vm.name}: {seen}")


def decided(source: lab.LabVm, destination: lab.LabVm | None) -> tuple[bool, str]:
    """Decide a move as its destination says; return whether it was finished, and a note."""
    finish, deadline = destination is not None, time.monotonic() + PATIENCE
    while True:
        try:
            decide_once(source, destination, finish=finish)
            return finish, ""
        except CheckFailed as error:
            assert error.code in ("not-released", "held"), error
            assert time.monotonic() < deadline, error
            finish = finish and error.code != "not-released"
        except AttemptFailed as error:
            assert not finish, error
            return False, f" ({error.code or error})"


def decide_once(source: lab.LabVm, destination: lab.LabVm | None, *, finish: bool) -> None:
    with ovr.attach(f"lab:{source.name}") as vm, Bracket(vm) as leaving:
        if destination is None:
            decide(leaving, None, None, finish=finish)
            return
        with ovr.attach(f"lab:{destination.name}") as other, Bracket(other) as arriving:
            decide(leaving, arriving.agent, None, finish=finish)
