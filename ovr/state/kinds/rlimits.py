"""Write resource limits: ``task->signal->rlim``."""

from typing import Any, Final

from ovr.errors import ImagesDamaged
from ovr.images import CoreEntry
from ovr.state.kind import Kind
from ovr.state.scope import PROCESS

__all__ = ["KINDS", "Rlimits"]

_RLIMIT_CPU: Final = 0
_INFINITY: Final = (1 << 64) - 1

Limit = tuple[int, int]


class Rlimits(Kind):
    """setrlimit(2), all limits except RLIMIT_CPU.

    RLIMIT_CPU stays inside: update_rlimit_cpu() also arms a CPU timer of the process.
    """

    name = "rlimits"
    groups = ("process",)
    summary = "resource limits except RLIMIT_CPU (signal_struct.rlim)"
    source = "restore_rlims() in criu/pie/restorer.c; do_prlimit()"
    scope = PROCESS

    def take(self, image: CoreEntry) -> tuple[Limit, ...] | None:
        """Return soft and hard limits from RLIMIT_FSIZE (1) on; all ones means infinity."""
        limits = tuple((limit.cur, limit.max) for limit in image.tc.rlimits.rlimits)
        if any(soft > hard for soft, hard in limits):
            raise ImagesDamaged("a soft resource limit above the hard one", "dump again")
        return limits[_RLIMIT_CPU + 1 :] or None

    def neutralise(self, image: CoreEntry) -> None:
        """Set all limits to infinity."""
        for limit in list(image.tc.rlimits.rlimits)[_RLIMIT_CPU + 1 :]:
            limit.cur = limit.max = _INFINITY

    def write(self, target: Any, value: tuple[Limit, ...]) -> None:
        """Store as do_prlimit() does for these resources."""
        # SAFETY: the signal_struct is the process's own, the process is stopped, and prlimit() of
        # another process stores the same two words; readers use READ_ONCE for each. Usage is
        # counted elsewhere and compared when it grows. Undone by killing the tree.
        for number, (soft, hard) in enumerate(value, _RLIMIT_CPU + 1):
            limit = target.signal.rlim[number]
            limit.rlim_cur, limit.rlim_max = soft, hard

    def read(self, target: Any) -> tuple[Limit, ...]:
        limits = list(target.signal.rlim)[_RLIMIT_CPU + 1 :]
        return tuple((limit.rlim_cur, limit.rlim_max) for limit in limits)


KINDS: Final = (Rlimits(),)
