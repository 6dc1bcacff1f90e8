"""Record writes to kernel objects, and revert those to objects that may outlive the tree.

Most objects are the tree's own: killing the tree is their undo. A namespace may have other users,
which joined it or were joined by the tree. Its fields are reverted in a hold, one by one, if the
object can be found again by the same path or through another user, and only where the field still
has the value that was written.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ovr.attempt.journal import FieldWrite, Journal, Undo
from ovr.errors import AttemptFailed, GuestFault, OvrError
from ovr.kernel import Kernel, Struct, settled, types_that_fit
from ovr.memory.addresses import Gva
from ovr.state.guest import GuestTree
from ovr.state.kind import Kind
from ovr.state.scope import Binding, Users
from ovr.vm.hold import Holder

__all__ = ["Recording"]

log = logging.getLogger("ovr.journal")


@dataclass
class _Lasting:
    # An object that may outlive the tree, how to find it again, and the writes to it.
    binding: Binding
    users: Users
    target: Struct
    writes: list[FieldWrite] = field(default_factory=list)


class Recording:
    """Records the writes of kinds of state, and reverts those that must not stay.

    Args:
        journal: gets the records.
        kernel: the guest's kernel.
        tree: looks for the restored tree anew; raises `AttemptFailed` if it is gone.
        holder: holds the VM.
    """

    def __init__(
        self, journal: Journal, kernel: Kernel, tree: Callable[[], GuestTree], holder: Holder
    ) -> None:
        self.journal = journal
        self._kernel = kernel
        self._tree = tree
        self._holder = holder
        self._lasting: list[_Lasting] = []
        self._logged = 0

    @contextmanager
    def of(self, kind: Kind, binding: Binding, target: Any) -> Iterator[None]:
        """Record the writes in the body of the ``with``.

        Args:
            kind: what is written.
            binding: where it belongs.
            target: the kernel object that `binding` was found to be.
        """
        raw: list[FieldWrite] = []
        if kind.scope.users is not None:
            # Before the first write, so that whatever interrupts us finds it here.
            self._lasting.append(_Lasting(binding, kind.scope.users, target, raw))

        def record(path: str, gva: Gva, old: bytes, new: bytes) -> None:
            gpa = space.translate(gva)
            write = FieldWrite(binding.label, kind.name, path, gva, gpa, old, new)
            raw.append(write)
            self.journal.add_field(write)

        space = self._kernel.space
        space.recorder = record
        try:
            yield
        finally:
            space.recorder = None

    def log_fields(self) -> None:
        """Log what has been recorded since the last call; not for holds, whose time is short."""
        for write in self.journal.fields[self._logged :]:
            log.info("%s", write)
        self._logged = len(self.journal.fields)

    @contextmanager
    def reverted_on(self, kind: type[BaseException]) -> Iterator[None]:
        """Revert what has been recorded if the body raises an error of that kind."""
        try:
            yield
        except kind as error:
            self.revert(error)
            raise

    def revert(self, cause: BaseException | None = None) -> None:
        """Revert recorded writes to objects that may outlive the tree.

        To be called before the tree is killed: while a task of it is there, it is certain which
        object was meant. A tree that is gone already (a broken link) leaves the search for another
        user.

        Args:
            cause: an `OvrError` among its kinds gets the outcome as `undone`.
        """
        self._undo()
        if isinstance(cause, OvrError):
            cause.undone = tuple(undo.as_json() for undo in self.journal.undone)

    def _undo(self) -> None:
        self.log_fields()
        while self._lasting:
            lasting = self._lasting.pop()
            try:
                with self._holder.held():
                    found = _undo(lasting, self._tree, self._kernel)
            except OvrError as error:
                found = [Undo(write, "failed", str(error)) for write in lasting.writes]
            for outcome in found:
                level = logging.WARNING if outcome.outcome == "failed" else logging.INFO
                log.log(level, "%s", outcome)
            self.journal.undone += found


def _undo(lasting: _Lasting, tree: Callable[[], GuestTree], kernel: Kernel) -> list[Undo]:
    target = _found_again(lasting, tree, kernel)
    writes = reversed(lasting.writes)
    if target is None:
        return [Undo(write, "gone", "no user of the object was found") for write in writes]
    outcomes = (_taken_back(write, target, kernel) for write in writes)
    return [outcome for outcome in outcomes if outcome]


def _taken_back(write: FieldWrite, target: Struct, kernel: Kernel) -> Undo | None:
    if not target.address_ <= write.gva <= target.address_ + target.size_ - len(write.new):
        return Undo(write, "failed", f"the field is outside of the {target.type_}")
    now = kernel.space.read(write.gva, len(write.new))
    if now == write.old:
        return None  # interrupted before the write, or the write changed nothing
    if now != write.new:
        return Undo(write, "changed", "the field was written by others since")
    # SAFETY: the object is the one that was written to: in this hold a task has led to it, and the
    # field has the value that was written. Owner, stillness and persistence are as for the kind's
    # own write. This is the undo.
    kernel.space.write(write.gva, write.old)
    return Undo(write, "undone")


def _found_again(lasting: _Lasting, tree: Callable[[], GuestTree], kernel: Kernel) -> Struct | None:
    try:
        guest = tree()
        with types_that_fit():
            found: Struct = lasting.binding.find(guest)
    except (AttemptFailed, GuestFault):
        pass  # the tree is gone, or about to go
    else:
        if found == lasting.target:
            return found
    users = settled(lambda: list(lasting.users(kernel)))
    return next((user for user in users if user == lasting.target), None)
