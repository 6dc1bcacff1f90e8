"""The memory descriptor: what ``mm_struct`` says of the address space besides its areas."""

from typing import Any, Final

from ovr.errors import ImagesDamaged, RestoreFailed
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
        """As prctl_set_mm_map() does, having checked the same."""
        # SAFETY: the mm is the process's own and the process is stopped. The kernel reads these
        # words for /proc (under arg_lock: a reader in the middle of it sees some old and some new
        # addresses, and reads user memory either way) and in brk(), which only the process
        # calls. Nothing is counted by them. Undone by killing the tree.
        for name, address in zip(self.fields, value, strict=True):
            setattr(target, name, address)

    def read(self, target: Any) -> tuple[int, ...]:
        """Read them."""
        return tuple(getattr(target, name) for name in self.fields)


class Code(_Bounds):
    """Where code, data and stack were put by exec."""

    name = "code_bounds"
    summary = "code, data and stack (mm_struct.start_code … end_data, start_stack)"
    fields = ("start_code", "end_code", "start_data", "end_data", "start_stack")
    pairs = (("start_code", "end_code"), ("start_data", "end_data"))

    def neutralise(self, image: MmEntry) -> None:
        """One byte of code and no data: the kernel wants code, and all of it below the heap."""
        low = min(image.mm_start_code, image.mm_start_data)
        image.mm_start_code = image.mm_start_data = image.mm_end_data = low + 1
        image.mm_end_code = image.mm_start_stack = low + 2


class Arguments(_Bounds):
    """Where /proc/PID/cmdline and environ are read from."""

    name = "arguments"
    summary = "arguments and environment (mm_struct.arg_start … env_end)"
    fields = ("arg_start", "arg_end", "env_start", "env_end")
    pairs = (("arg_start", "arg_end"), ("env_start", "env_end"))

    def neutralise(self, image: MmEntry) -> None:
        """None: both are empty."""
        image.mm_arg_end = image.mm_env_start = image.mm_env_end = image.mm_arg_start


class Brk(_Bounds):
    """brk(2)."""

    name = "brk"
    summary = "bounds of the heap (mm_struct.start_brk, brk)"
    fields = ("start_brk", "brk")
    pairs = (("start_brk", "brk"),)

    def neutralise(self, image: MmEntry) -> None:
        """An empty heap, one byte higher up."""
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
        """Return the words up to the last that is not zero: the rest ends the vector."""
        words = list(image.mm_saved_auxv)
        while words and not words[-1]:
            words.pop()
        return tuple(words)

    def neutralise(self, image: MmEntry) -> None:
        """As long, and empty."""
        image.mm_saved_auxv[:] = [0] * len(image.mm_saved_auxv)

    def write(self, target: Any, value: tuple[int, ...]) -> None:
        """As prctl_set_mm_map() does: the vector always ends with AT_NULL and its zero."""
        vector = target.saved_auxv
        if len(value) > len(vector) - 2:
            raise RestoreFailed(
                f"an auxiliary vector of {len(value)} words, and room for {len(vector) - 2}",
                "restore with the kernel that the process was dumped with",
            )
        # SAFETY: the mm is the process's own and the process is stopped. The kernel reads the
        # vector for /proc/PID/auxv only, up to AT_NULL, which the last pair always is. Undone by
        # killing the tree.
        target.saved_auxv = value + (0,) * (len(vector) - len(value))

    def read(self, target: Any) -> tuple[int, ...]:
        """Read it."""
        words = list(target.saved_auxv)
        while words and not words[-1]:
            words.pop()
        return tuple(words)


class Dumpable(Kind):
    """PR_SET_DUMPABLE."""

    name = "dumpable"
    groups = ("mm",)
    summary = "who may look into the process (mm_struct.flags, task_exec_state.dumpable)"
    source = "restore_dumpable_flag() in criu/pie/restorer.c; set_dumpable()"
    scope = MM_OWNER

    def take(self, image: MmEntry) -> int | None:
        """Return 0, 1, or 2 for root only."""
        if not image.HasField("dumpable"):
            return None
        if not 0 <= image.dumpable <= _SUID_DUMP_ROOT:
            raise ImagesDamaged(f"there is no dumpable {image.dumpable}", "dump again")
        return image.dumpable

    def neutralise(self, image: MmEntry) -> None:
        """Not dumpable: nobody looks into a process that is not whole."""
        image.dumpable = 0

    def write(self, target: Any, value: int) -> None:
        """As set_dumpable() does, and what came after it."""
        # SAFETY: mm and exec_state are the process's own, and it is stopped. The other flags in
        # the mm's word are set by atomic instructions, among others of khugepaged and KSM; the
        # hold keeps them from coming between our read and our write. Who asks for dumpable reads
        # it anew each time. Undone by killing the tree.
        try:
            # Linux kernel commit 6b1c66c9cca9 ("exec_state: relocate dumpable information")
            target.exec_state.dumpable = value
        except NoSuchMember:
            flags = _flags(target.mm)
            flags[0] = flags[0] & ~_MMF_DUMPABLE_MASK | value

    def read(self, target: Any) -> int:
        """Read it."""
        try:
            return int(target.exec_state.dumpable)
        except NoSuchMember:
            return int(_flags(target.mm)[0] & _MMF_DUMPABLE_MASK)


def _flags(mm: Struct) -> Any:
    # Bits have no type: those of the old word are the first of the bitmap that it has become.
    return address_of(mm, "flags").cast_("unsigned long")


KINDS: Final = (Code(), Arguments(), Brk(), Auxv(), Dumpable())
