"""Write the parts of a thread's credentials that are plain data."""

from typing import Any, Final

from ovr.errors import AttemptFailed, GuestFault, ImagesDamaged
from ovr.images import CoreEntry
from ovr.images.messages import CredsEntry
from ovr.images.wire import Scalars
from ovr.kernel import Struct, capabilities
from ovr.state.kind import Kind
from ovr.state.scope import THREAD

__all__ = ["KINDS", "Capabilities", "NoNewPrivs", "Securebits"]

_PFA_NO_NEW_PRIVS: Final = 1  # bit 0
_SETS: Final = ("inheritable", "permitted", "effective", "bset", "ambient")
_MAX_PARENTS: Final = 1 << 16


def _own_cred(thread: Struct) -> Any:
    """Return a thread's ``struct cred``; raise if it is referenced elsewhere.

    Credentials are copied, changed and then shared read-only (Documentation/security/credentials).
    CRIU gives every thread its own copy (each of its capset() calls makes one), so the thread's two
    references are the only ones.
    """
    cred = thread.cred
    if cred != thread.real_cred or cred.usage.counter != 2:
        raise AttemptFailed(
            f"the credentials of thread {thread.pid} are in use elsewhere in the guest",
            "restore again; if it happens again, leave securebits and capabilities inside",
        )
    return cred


class NoNewPrivs(Kind):
    """PR_SET_NO_NEW_PRIVS."""

    name = "no_new_privs"
    groups = ("thread", "credentials")
    summary = "no new privileges by exec (bit 0 of task_struct.atomic_flags)"
    source = "restore_creds() in criu/pie/restorer.c; task_set_no_new_privs()"
    scope = THREAD

    def take(self, image: CoreEntry) -> bool | None:
        """Return whether it is set.

        None under seccomp, whose filters CRIU installs with it, and if it was not dumped: CRIU up
        to 3.17 does not.
        """
        creds = image.thread_core.creds
        if image.thread_core.seccomp_mode or not creds.HasField("no_new_privs"):
            return None
        return bool(creds.no_new_privs)

    def neutralise(self, image: CoreEntry) -> None:
        """Remove the field: not set."""
        image.thread_core.creds.ClearField("no_new_privs")

    def write(self, target: Any, value: bool) -> None:
        """Store as task_set_no_new_privs() does."""
        # SAFETY: the other bits of the word are set and cleared by atomic instructions, of this
        # thread, which is stopped, and of cpuset writers, which the hold keeps from coming between
        # our read and our write. The kernel never clears this bit: CRIU has left it clear. Undone
        # by killing the tree.
        target.atomic_flags = target.atomic_flags & ~_PFA_NO_NEW_PRIVS | value

    def read(self, target: Any) -> bool:
        return bool(target.atomic_flags & _PFA_NO_NEW_PRIVS)


class Securebits(Kind):
    """PR_SET_SECUREBITS."""

    name = "securebits"
    groups = ("thread", "credentials")
    summary = "securebits (cred.securebits)"
    source = "restore_creds() in criu/pie/restorer.c; cap_task_prctl()"
    scope = THREAD

    def take(self, image: CoreEntry) -> int | None:
        """Return the bits."""
        return image.thread_core.creds.secbits if image.thread_core.HasField("creds") else None

    def neutralise(self, image: CoreEntry) -> None:
        """Clear all bits."""
        image.thread_core.creds.secbits = 0

    def write(self, target: Any, value: int) -> None:
        """Store as cap_task_prctl() does in its copy."""
        # SAFETY: only the stopped thread has these credentials (checked by _own_cred in this hold).
        # Nothing is derived from the bits. Undone by killing the tree.
        _own_cred(target).securebits = value

    def read(self, target: Any) -> int:
        return int(target.cred.securebits)


class Capabilities(Kind):
    """capset(2), PR_CAPBSET_DROP, PR_CAP_AMBIENT."""

    name = "capabilities"
    groups = ("thread", "credentials")
    summary = "capability sets (cred.cap_inheritable, permitted, effective, bset, ambient)"
    source = "restore_creds() in criu/pie/restorer.c; cap_capset()"
    scope = THREAD

    def take(self, image: CoreEntry) -> tuple[int, ...] | None:
        """Return the sets: inheritable, permitted, effective, bounding, ambient.

        CRIU up to 3.17 does not dump the ambient set; it is empty then.
        """
        if not image.thread_core.HasField("creds"):
            return None
        sets = tuple(_set(words) for words in _words(image.thread_core.creds))
        inheritable, permitted, effective, _, ambient = sets
        if effective & ~permitted or ambient & ~(permitted & inheritable):
            raise ImagesDamaged("impossible capabilities", "dump again")
        return sets

    def neutralise(self, image: CoreEntry) -> None:
        """Clear all sets: any thread may drop all of its capabilities."""
        for words in _words(image.thread_core.creds):
            words[:] = [0] * len(words)

    def write(self, target: Any, value: tuple[int, ...]) -> None:
        """Store as cap_capset() does in its copy."""
        # SAFETY: only the stopped thread has these credentials (checked by _own_cred in this hold).
        # commit_creds() also sets dumpable and pdeath_signal, which are set by their own kinds or
        # by CRIU after its commit_creds(). Undone by killing the tree.
        cred, known = _own_cred(target), _all_capabilities(target)
        for name, wanted in zip(_SETS, value, strict=True):
            if wanted & ~known:
                raise AttemptFailed(
                    f"the guest's kernel does not know capabilities {wanted & ~known:#x}",
                    "restore with a newer kernel, or leave capabilities inside",
                )
            capabilities(cred, name)[0] = wanted

    def read(self, target: Any) -> tuple[int, ...]:
        return tuple(capabilities(target.cred, name)[0] for name in _SETS)


def _words(creds: CredsEntry) -> tuple[Scalars[int], ...]:
    return creds.cap_inh, creds.cap_prm, creds.cap_eff, creds.cap_bnd, creds.cap_amb


def _set(words: Scalars[int]) -> int:
    return sum(word << 32 * number for number, word in enumerate(list(words)[:2]))


def _all_capabilities(thread: Any) -> int:
    # The idle task, ancestor of all tasks and its own parent, always has CAP_FULL_SET.
    for _ in range(_MAX_PARENTS):
        parent = thread.real_parent
        if parent == thread:
            return int(capabilities(thread.cred, "permitted")[0])
        thread = parent
    raise GuestFault("a task with a cycle of ancestors", thread.address_)


KINDS: Final = (NoNewPrivs(), Securebits(), Capabilities())
