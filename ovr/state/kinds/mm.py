"""Write the fields of ``mm_struct`` that describe the address space, except its areas."""

from typing import Any, Final

from ovr.errors import AttemptFailed, ImagesDamaged
from ovr.images import MmEntry
from ovr.kernel import NoSuchMember, Struct, address_of
from ovr.state.kind import Kind
from ovr.state.scope import MM, MM_OWNER

__all__ = ["KINDS", "Arguments", "Auxv", "Brk", "Code", "Dumpable"]

_USER_END: Final = 1 << 56
_MMF_DUMPABLE_MASK: Final = 3  # include/linux/mm_types.h; sched/coredump.h before v6.18
_SUID_DUMP_ROOT: Final = 2


class _Bounds(Kind):
    """Some of the addresses that prctl(PR_SET_MM, PR_SET_MM_MAP) sets."""

    groups = ("mm",)
    source = "PR_SET_MM_MAP in criu/pie/restorer.c; prctl_set_mm_map()"
    scope = MM
    fields: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    def take(self, image: MmEntry) -> tuple[int, ...]:
        """Return the addresses, in the order of `fields`."""
        values = {name: getattr(image, f"mm_{name}") for name in self.fields}
        if any(not 0 <= value < _USER_END for value in values.values()):
            raise ImagesDamaged("a memory descriptor with kernel addresses", "dump again")
        if any(values[start] > values[end] for start, end in self.pairs):
            raise ImagesDamaged("a memory descriptor with an end before its start", "dump again")
        return tuple(values.values())

    def write(self, target: Any, value: tuple[int, ...]) -> None:
        """Store as prctl_set_mm_map() does; `take` has made the same checks."""
        # SAFETY: the mm is the process's own and the process is stopped. The kernel reads these
        # words for /proc (under arg_lock: a concurrent reader may get some old and some new
        # addresses, and reads user memory either way) and in brk(), which only the process
        # calls. No accounting depends on them. Undone by killing the tree.
        for name, address in zip(self.fields, value, strict=True):
            setattr(target, name, address)

    def read(self, target: Any) -> tuple[int, ...]:
        return tuple(getattr(target, name) for name in self.fields)


class Code(_Bounds):
    """Bounds of code, data and stack, as set by exec."""

    name = "code_bounds"
    summary = "code, data and stack (mm_struct.start_code … end_data, start_stack)"
    fields = ("start_code", "end_code", "start_data", "end_data", "start_stack")
    pairs = (("start_code", "end_code"), ("start_data", "end_data"))

    def neutralise(self, image: MmEntry) -> None:
        """Set one byte of code and no data: the kernel requires code, all of it below the heap."""
        low = min(image.mm_start_code, image.mm_start_data)
        image.mm_start_code = image.mm_start_data = image.mm_end_data = low + 1
        image.mm_end_code = image.mm_start_stack = low + 2


class Arguments(_Bounds):
    """Bounds of /proc/PID/cmdline and environ."""

    name = "arguments"
    summary = "arguments and environment (mm_struct.arg_start … env_end)"
    fields = ("arg_start", "arg_end", "env_start", "env_end")
    pairs = (("arg_start", "arg_end"), ("env_start", "env_end"))

    def neutralise(self, image: MmEntry) -> None:
        """Make both empty."""
        image.mm_arg_end = image.mm_env_start = image.mm_env_end = image.mm_arg_start


class Brk(_Bounds):
    """brk(2)."""

    name = "brk"
    summary = "bounds of the heap (mm_struct.start_brk, brk)"
    fields = ("start_brk", "brk")
    pairs = (("start_brk", "brk"),)

    def neutralise(self, image: MmEntry) -> None:
        """Set an empty heap, one byte higher."""
        image.mm_start_brk += 1
        image.mm_brk = image.mm_start_brk


class Auxv(Kind):
    """``/proc/PID/auxv``."""

    name = "auxv"
    groups = ("mm",)
    summary = "auxiliary vector as exec made it (mm_struct.saved_auxv)"
    source = "PR_SET_MM_MAP in criu/pie/restorer.c; prctl_set_mm_map()"
    scope = MM

    def take(self, image: MmEntry) -> tuple[int, ...]:
        """Return the words without trailing zeros, which end the vector."""
        words = list(image.mm_saved_auxv)
        while words and not words[-1]:
            words.pop()
        return tuple(words)

    def neutralise(self, image: MmEntry) -> None:
        """Set all words to 0; the length stays."""
        image.mm_saved_auxv[:] = [0] * len(image.mm_saved_auxv)

    def write(self, target: Any, value: tuple[int, ...]) -> None:
        """Store as prctl_set_mm_map() does: the vector always ends with AT_NULL and its zero."""
        vector = target.saved_auxv
        if len(value) > len(vector) - 2:
            raise AttemptFailed(
                f"an auxiliary vector of {len(value)} words; the kernel has {len(vector) - 2}",
                "restore with the kernel that the process was dumped with",
            )
        # SAFETY: the mm is the process's own and the process is stopped. The kernel reads the
        # vector only for /proc/PID/auxv, up to AT_NULL, which is always in the last pair. Undone by
        # killing the tree.
        target.saved_auxv = value + (0,) * (len(vector) - len(value))

    def read(self, target: Any) -> tuple[int, ...]:
        words = list(target.saved_auxv)
        while words and not words[-1]:
            words.pop()
        return tuple(words)


class Dumpable(Kind):
    """PR_SET_DUMPABLE."""

    name = "dumpable"
    groups = ("mm",)
    summary = "permission to inspect the process (mm_struct.flags, task_exec_state.dumpable)"
    source = "restore_dumpable_flag() in criu/pie/restorer.c; set_dumpable()"
    scope = MM_OWNER

    def take(self, image: MmEntry) -> int | None:
        """Return 0, 1, or 2 for root only."""
        if not image.HasField("dumpable"):
            return None
        if not 0 <= image.dumpable <= _SUID_DUMP_ROOT:
            raise ImagesDamaged(f"impossible dumpable value {image.dumpable}", "dump again")
        return image.dumpable

    def neutralise(self, image: MmEntry) -> None:
        """Set not dumpable: an incomplete process cannot be inspected."""
        image.dumpable = 0

    def write(self, target: Any, value: int) -> None:
        """Store as set_dumpable() does, or its successor."""
        # SAFETY: mm and exec_state are the process's own, and it is stopped. The other flags in
        # the mm's word are set by atomic instructions, for example by khugepaged and KSM; during
        # the hold none can run between our read and our write. Readers of dumpable keep no copy.
        # Undone by killing the tree.
        try:
            # Linux kernel commit 6b1c66c9cca9 ("exec_state: relocate dumpable information")
            target.exec_state.dumpable = value
        except NoSuchMember:
            flags = _flags(target.mm)
            flags[0] = flags[0] & ~_MMF_DUMPABLE_MASK | value

    def read(self, target: Any) -> int:
        try:
            return int(target.exec_state.dumpable)
        except NoSuchMember:
            return int(_flags(target.mm)[0] & _MMF_DUMPABLE_MASK)


def _flags(mm: Struct) -> Any:
    # BTF has no bit numbers. Newer kernels have a bitmap here, which begins with the old bits.
    return address_of(mm, "flags").cast_("unsigned long")


KINDS: Final = (Code(), Arguments(), Brk(), Auxv(), Dumpable())
