"""The race of all ways to restore one process, with the VM idle and with the VM loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.guest import Guest, Subject, warm_cache
from bench.memcpy import MemcpyLimit
from bench.outside import Outside
from bench.race import Heats, Lane, Measures, race
from bench.warm import Warm

INSIDE, BARE, COLD, WARM = "criu_inside", "criu_bare", "ovr_cold", "ovr_warm"
LIMIT = "memcpy"


@dataclass
class Lanes:
    """Makes the lanes of a subject.

    Attributes:
        guest: the VM.
        subject: what is restored.
        limit: the memcpy limit of its images, if it is to be measured.
        checks: whether what is restored looks at its memory in the first heat.
    """

    guest: Guest
    subject: Subject
    limit: MemcpyLimit | None = None
    checks: bool = True
    warm: Warm = field(init=False)

    def __post_init__(self) -> None:
        self._outside = Outside(self.guest.vm, self.subject.images)
        self.warm = Warm(self.guest.vm, self.subject.images)

    def inside(self) -> Lane:
        """By the guest's CRIU."""
        return Lane(INSIDE, lambda: self.guest.restore(self.subject), self._clear, self._check)

    def cold(self) -> Lane:
        """By `ovr`, which knows nothing in advance."""
        return Lane(COLD, self._restore_outside, self._clear, self._check)

    def warmed(self) -> Lane:
        """By `ovr`, into memory that the guest has ready."""

        def prepare() -> None:
            self._clear()
            self.warm.on()

        def run() -> Measures:
            measures = self._restore_outside("warm")
            self.warm.off()
            return measures

        return Lane(WARM, run, prepare, self._check)

    def inside_vm(self) -> list[Lane]:
        """All that can run here."""
        return [self.inside(), self.cold(), *([self.warmed()] if self.warm.exists else [])]

    def prepare_bare(self) -> None:
        """Leave the host to others: nothing runs in the VM, and the images are in memory."""
        self._clear()

    def peak_memory(self) -> int:
        """Return the most memory that a restore by `ovr` needs on the host, in bytes."""
        self._clear()
        return self._outside.peak_memory()

    def _restore_outside(self, skeleton: str = "cold") -> Measures:
        measures = dict(self._outside.run(skeleton))
        if self.limit:
            measures[LIMIT] = self.limit.seconds()
        return measures

    def _clear(self) -> None:
        self.guest.clear(self.subject)
        warm_cache(self.subject.images)

    def _check(self) -> None:
        if self.checks:
            self.guest.check(self.subject)


def idle_and_loaded(
    guest: Guest, idle: Sequence[Lane], loaded: Sequence[Lane], rounds: int
) -> tuple[Heats, Heats]:
    """Run both races, a round of each in turn, after one round that does not count.

    What is restored is checked in that round only. With one round, it counts.
    """
    heats: tuple[Heats, Heats] = ({}, {})
    first = race(idle, 1)
    idle, loaded = _unchecked(idle), _unchecked(loaded)
    for number in range(rounds):
        _add(heats[0], race(_turned(idle, number), 1) if rounds > 1 else first)
        with guest.loaded():
            _add(heats[1], race(_turned(loaded, number), 1))
    return heats


def _unchecked(lanes: Sequence[Lane]) -> list[Lane]:
    return [Lane(lane.name, lane.run, lane.prepare) for lane in lanes]


def _turned(lanes: Sequence[Lane], by: int) -> list[Lane]:
    by %= len(lanes)
    return [*lanes[by:], *lanes[:by]]


def _add(heats: Heats, more: Heats) -> None:
    for name, new in more.items():
        heats.setdefault(name, []).extend(new)


__all__ = ["BARE", "COLD", "INSIDE", "LIMIT", "WARM", "Lanes", "idle_and_loaded"]
