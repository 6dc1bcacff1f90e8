"""The writes of a restore, and their undo if it is aborted.

Writes to kernel fields are listed one by one with old and new content, writes to memory as one sum
for each process or shared object.
"""

from dataclasses import dataclass, field
from typing import Any

from ovr.memory.addresses import Gpa, Gva
from ovr.memory.extents import Extents, ends_of, total

__all__ = ["FieldWrite", "Journal", "MemoryWrite", "Undo"]


@dataclass(frozen=True)
class FieldWrite:
    """One write to a field of a kernel object.

    Attributes:
        of: the owner of the state: ``pid 12``.
        state: the kind of state.
        field: the kernel's name of the field: ``fs_struct.umask``.
        gva: its virtual address in the kernel.
        gpa: its physical address.
        old: its bytes before the write.
        new: its bytes after the write.
    """

    of: str
    state: str
    field: str
    gva: Gva
    gpa: Gpa
    old: bytes
    new: bytes

    def __str__(self) -> str:
        return (
            f"{self.of}: {self.state}: {self.field} at {self.gva:#x} (GPA {self.gpa:#x}):"
            f" {_shown(self.values[0])} -> {_shown(self.values[1])}"
        )

    @property
    def values(self) -> tuple[int, int] | tuple[str, str]:
        """Old and new: words as numbers, text as text, all else as hexadecimal digits."""
        old, new = self.old, self.new
        if len(old) in (1, 2, 4, 8):
            return int.from_bytes(old, "little"), int.from_bytes(new, "little")
        if any(new) and _is_text(old) and _is_text(new):
            return old.partition(b"\0")[0].decode(), new.partition(b"\0")[0].decode()
        return old.hex(), new.hex()

    def as_json(self) -> dict[str, Any]:
        """Return the fields as ``ovr.restore/1`` has them in ``journal.fields``."""
        old, new = self.values
        return {
            "of": self.of,
            "state": self.state,
            "field": self.field,
            "gva": self.gva,
            "gpa": self.gpa,
            "old": old,
            "new": new,
        }


@dataclass
class MemoryWrite:
    """Pages that were written into one address space or one shared object.

    Attributes:
        target: ``pid 12``, ``shared memory 3``.
        bytes: bytes written.
        runs: number of contiguous pieces of physical memory at the time of the copy.
        start: the lowest GVA.
        end: the first GVA after the highest page.
    """

    target: str
    bytes: int
    runs: int
    start: Gva
    end: Gva

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.bytes} bytes in {self.runs} runs between {self.start:#x} and"
            f" {self.end:#x}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the fields as ``ovr.restore/1`` has them in ``journal.memory``."""
        return {
            "target": self.target,
            "bytes": self.bytes,
            "runs": self.runs,
            "start": self.start,
            "end": self.end,
        }


@dataclass(frozen=True)
class Undo:
    """The outcome of reverting a write to an object that may outlive the tree.

    Attributes:
        write: the write.
        outcome: ``undone``; ``gone`` (the object has no user any more); ``changed`` (the field was
            written by others since, and was left alone); or ``failed``.
        reason: of an outcome but ``undone``, for people.
    """

    write: FieldWrite
    outcome: str
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.write.of}: {self.write.state}: {self.write.field}: {self.outcome}"
        return f"{text}: {self.reason}" if self.reason else text

    def as_json(self) -> dict[str, Any]:
        """Return the fields as ``ovr.error/1`` has them in ``undone``."""
        return {**self.write.as_json(), "outcome": self.outcome, "reason": self.reason}


@dataclass
class Journal:
    """The writes of one restore, in their order.

    Attributes:
        fields: kernel fields whose content has changed.
        unchanged: number of writes that changed nothing.
        memory: pages, one entry for each target.
        undone: the outcome of an undo.
    """

    fields: list[FieldWrite] = field(default_factory=list)
    unchanged: int = 0
    memory: list[MemoryWrite] = field(default_factory=list)
    undone: list[Undo] = field(default_factory=list)

    def add_field(self, write: FieldWrite) -> None:
        """Add a write; consecutive elements of an array become one entry."""
        last = self.fields[-1] if self.fields else None
        if write.old == write.new:
            self.unchanged += 1
        elif last and _continues(last, write):
            self.fields[-1] = FieldWrite(
                last.of, last.state, last.field, last.gva, last.gpa,
                last.old + write.old, last.new + write.new,
            )  # fmt: skip
        else:
            self.fields.append(write)

    def add_memory(self, target: str, runs: Extents) -> None:
        """Add pages that were written, a `_fastcopy.RUN` array."""
        if not len(runs):
            return
        start, end = int(runs["gva"].min()), int(ends_of(runs).max())
        size = total(runs)
        for entry in self.memory:
            if entry.target == target:
                entry.bytes += size
                entry.runs += len(runs)
                entry.start, entry.end = Gva(min(entry.start, start)), Gva(max(entry.end, end))
                return
        self.memory.append(MemoryWrite(target, size, len(runs), Gva(start), Gva(end)))

    def as_json(self) -> dict[str, Any]:
        """Return the fields of ``journal`` in ``ovr.restore/1``."""
        return {
            "fields": [write.as_json() for write in self.fields],
            "unchanged": self.unchanged,
            "memory": [write.as_json() for write in self.memory],
        }


def _continues(last: FieldWrite, write: FieldWrite) -> bool:
    same = (last.of, last.state, last.field) == (write.of, write.state, write.field)
    return same and last.gva + len(last.new) == write.gva


def _is_text(data: bytes) -> bool:
    text, _, rest = data.partition(b"\0")
    return text.isascii() and text.decode().isprintable() and not any(rest)


def _shown(value: int | str) -> str:
    return f"{value:#x}" if isinstance(value, int) else repr(value)
