"""Write process-wide state: ``signal_struct``, and thread fields that are equal in all threads."""

from collections.abc import Iterator
from typing import Any, Final

from ovr.errors import ImagesDamaged
from ovr.images import CoreEntry
from ovr.kernel import Struct, for_each_thread, in_own_user_ns, list_for_each_entry
from ovr.state.kind import Kind
from ovr.state.scope import PROCESS, PROCESS_OF_THE_VM

__all__ = ["KINDS", "ChildSubreaper", "Loginuid", "OomScoreAdj", "Personality"]

_OOM_SCORE_ADJ_MAX: Final = 1000
_PERSONALITIES: Final = 0x0FFE_00FF  # flags and PER_MASK of include/uapi/linux/personality.h


class OomScoreAdj(Kind):
    """``/proc/PID/oom_score_adj``."""

    name = "oom_score_adj"
    groups = ("process",)
    summary = "OOM score adjustment (signal_struct.oom_score_adj, oom_score_adj_min)"
    source = "restore_oom_score_adj() in criu/cr-restore.c; __set_oom_adj()"
    scope = PROCESS

    def take(self, image: CoreEntry) -> int | None:
        """Return the adjustment."""
        if not image.tc.HasField("oom_score_adj"):
            return None
        value = image.tc.oom_score_adj
        if abs(value) > _OOM_SCORE_ADJ_MAX:
            raise ImagesDamaged(f"oom_score_adj {value} is outside of -1000 .. 1000", "dump again")
        return value

    def neutralise(self, image: CoreEntry) -> None:
        """Remove the field."""
        image.tc.ClearField("oom_score_adj")

    def write(self, target: Any, value: int) -> None:
        """Store as the kernel does for CRIU, with the lower bound if CRIU is privileged.

        In the tree's own user namespace it is not (``has_capability_noaudit()``): the bound stays,
        unless the value is below it.
        """
        # SAFETY: the signal_struct is the process's own; no other process shares its mm and would
        # need the same value (CRIU does not dump CLONE_VM). Two stores; the OOM killer reads one
        # of them, and either value is right. Undone by killing the tree.
        target.signal.oom_score_adj = value
        if not in_own_user_ns(target) or value < target.signal.oom_score_adj_min:
            target.signal.oom_score_adj_min = value

    def read(self, target: Any) -> int | None:
        """Return the adjustment; None if the lower bound does not match it."""
        value, bound = int(target.signal.oom_score_adj), int(target.signal.oom_score_adj_min)
        good = bound <= value if in_own_user_ns(target) else bound == value
        return value if good else None


class Personality(Kind):
    """personality(2), which CRIU dumps and never restores."""

    name = "personality"
    groups = ("process",)
    summary = "execution domain (task_struct.personality of all threads); CRIU never restores it"
    source = "get_task_personality() in criu/cr-dump.c; sys_personality()"
    scope = PROCESS

    def take(self, image: CoreEntry) -> int:
        """Return the personality.

        CRIU parses the eight hexadecimal digits of /proc/PID/personality with atoi(): the image has
        them as a decimal number that ends before the first letter. A single flag has no letter;
        where two flags make one, the digits that CRIU dropped are lost.
        """
        value = image.tc.personality
        for meant in (int(str(value), 16), value):  # second: a CRIU with this fixed
            if not meant & ~_PERSONALITIES:
                return meant
        raise ImagesDamaged(f"impossible personality {value}", "dump again")

    def neutralise(self, image: CoreEntry) -> None:
        """Do nothing: CRIU ignores the field."""

    def write(self, target: Any, value: int) -> None:
        """Store as sys_personality() does, in every thread: CRIU dumps only the leader's."""
        # SAFETY: only the thread itself ever writes or reads its personality outside of exec, and
        # it is stopped. set_personality() is one store. Undone by killing the tree.
        for thread in for_each_thread(target):
            thread.personality = value

    def read(self, target: Any) -> int | None:
        """Return the personality; None if the threads differ."""
        return _common(thread.personality for thread in for_each_thread(target))


class Loginuid(Kind):
    """``/proc/PID/loginuid``; left to CRIU if the images have ids of a user namespace."""

    name = "loginuid"
    groups = ("process",)
    summary = "audit login uid (task_struct.loginuid of all threads)"
    source = "prepare_loginuid() in criu/cr-restore.c; audit_set_loginuid()"
    scope = PROCESS_OF_THE_VM

    def take(self, image: CoreEntry) -> int | None:
        """Return the uid in the initial user namespace."""
        return image.tc.loginuid if image.tc.HasField("loginuid") else None

    def neutralise(self, image: CoreEntry) -> None:
        """Remove the field."""
        image.tc.ClearField("loginuid")

    def write(self, target: Any, value: int) -> None:
        """Store as audit_set_loginuid() does, without a new session id: this is no login."""
        # SAFETY: only the thread itself writes it (through /proc/self), and it is stopped; audit
        # reads it in the thread's own context. One store for each thread. Undone by killing the
        # tree.
        for thread in for_each_thread(target):
            thread.loginuid.val = value

    def read(self, target: Any) -> int | None:
        """Return the uid; None if the threads differ."""
        return _common(thread.loginuid.val for thread in for_each_thread(target))


class ChildSubreaper(Kind):
    """PR_SET_CHILD_SUBREAPER."""

    name = "child_subreaper"
    groups = ("process",)
    summary = "child subreaper (signal_struct.is_child_subreaper, has_child_subreaper below it)"
    source = "restore_child_subreaper() in criu/pie/restorer.c; prctl_set_child_subreaper()"
    scope = PROCESS

    def take(self, image: CoreEntry) -> bool | None:
        """Return whether the process is a subreaper."""
        return image.tc.child_subreaper if image.tc.HasField("child_subreaper") else None

    def neutralise(self, image: CoreEntry) -> None:
        """Remove the field."""
        image.tc.ClearField("child_subreaper")

    def write(self, target: Any, value: bool) -> None:
        """Store as prctl() does, and mark descendants as having a subreaper above them."""
        # SAFETY: is_child_subreaper and has_child_subreaper are bitfields in one word of each
        # signal_struct, written by the process itself and by prctl() of its ancestors. The process
        # is stopped, and during the hold no ancestor runs between our read and our write.
        # Descendants of a restored task are restored tasks. Undone by killing the tree.
        target.signal.is_child_subreaper = value
        if value:
            for descendant in _descendants(target):
                descendant.signal.has_child_subreaper = True

    def read(self, target: Any) -> bool | None:
        """Return whether it is a subreaper; None if a descendant is not marked."""
        value = bool(target.signal.is_child_subreaper)
        known = all(child.signal.has_child_subreaper for child in _descendants(target))
        return value if known or not value else None


def _descendants(task: Struct) -> Iterator[Any]:
    # Source: walk_process_tree() in kernel/fork.c
    seen = {task.address_}
    parents = [task]
    while parents:
        for thread in for_each_thread(parents.pop()):
            for child in list_for_each_entry("struct task_struct", thread.children, "sibling"):
                if child.address_ not in seen:
                    seen.add(child.address_)
                    parents.append(child)
                    yield child


def _common(values: Iterator[int]) -> int | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None


KINDS: Final = (OomScoreAdj(), Personality(), Loginuid(), ChildSubreaper())
