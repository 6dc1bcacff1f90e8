"""Kill processes that take part in a dump, and check what is left."""

import shutil
from collections.abc import Callable
from pathlib import Path

from ovr import lab
from ovr.lab.share import SHARE
from tests import subject
from tests.kill import check
from tests.kill.attempt import DUMP, Attempt, events_of, perform
from tests.kill.place import Place
from tests.kill.steps import Point

__all__ = ["DumpRange"]

SIZE = 8 << 20
OF_THE_TREE = ("root", "task")
DAMAGED = "may not run as before"


class DumpRange(Place):
    """A VM with a tree, which is dumped into a directory that host and guest share.

    Args:
        boot: boots a VM that has the directory `share`.
        share: the directory.
        scratch: another one, for this run.
        rounds: of pre-copies.
    """

    story = DUMP

    def __init__(
        self, boot: Callable[[], lab.LabVm], share: Path, scratch: Path, rounds: int
    ) -> None:
        super().__init__([boot], scratch)
        self._images = share / "dump"
        self._rounds = rounds

    def command(self) -> list[str]:
        """Start a tree, and return the command of a dump of it."""
        vm = self.vm
        subject.end(vm)
        shutil.rmtree(self._images, ignore_errors=True)
        self._images.mkdir()
        pid = subject.start(vm, SIZE)
        return [
            "tests.kill.dumper",
            f"lab:{vm.name}",
            str(pid),
            str(self._images),
            str(self._rounds),
        ]

    def shoot(self, victim: str, point: Point) -> str:
        vm = self.vm
        attempt, met = perform([vm], self.command(), victim, point, self.temporary)
        try:
            became = self._after(vm, victim, attempt)
        finally:
            attempt.close()
        events_of(self.command(), self.temporary)
        self._restore(self.vm)
        shutil.rmtree(self._images)
        return became if met else f"{became}; nobody to kill"

    def _after(self, vm: lab.LabVm, victim: str, attempt: Attempt) -> str:
        said = check.said(victim, attempt)
        check.host_is_clean(vm, self.temporary)
        if victim == "qemu":
            assert said.startswith("failed ") or attempt.events[-1].name == "end of commit", said
            return said
        seen = check.once_quiet(vm)
        if victim in OF_THE_TREE:
            # Its own death: all else is as it was.
            assert said == "done" or said.startswith("failed "), said
            return f"{seen['subjects']} of 2 are left; {said}"
        if said == "done" or not seen["subjects"]:
            assert attempt.said_go, f"the tree has gone, and nobody said so: {said}"
            assert not seen["subjects"], "the tree was not ended"
            self._restore(vm)
            return "ended, and restored"
        if not attempt.said_go and said != "killed":
            assert not any(self._images.iterdir()), "images of a failed dump are left"
        try:
            assert seen["subjects"] == 2, f"{seen['subjects']} of 2 processes run"
            check.runs_on(vm)
        except AssertionError as error:
            # CRIU's parasite code was in it.
            if victim == "criu" and DAMAGED in said:
                return f"damaged, and reported: {error}"
            raise
        return "runs on" + (", reported as damaged" if DAMAGED in said else "")

    def _restore(self, vm: lab.LabVm) -> None:
        # By the guest's CRIU alone.
        subject.end(vm)
        restore = f"criu restore -d -D {SHARE}/{self._images.name} -v2 -o /tmp/restore.log"
        subject.must(vm, f"{restore} || {{ grep Error /tmp/restore.log >&2; false; }}")
        check.restored(vm, SIZE)
        subject.end(vm)
