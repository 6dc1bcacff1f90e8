"""Write signal masks, handlers and stacks of threads and processes."""

from typing import Any, Final

from ovr.errors import ImagesDamaged
from ovr.images import CoreEntry
from ovr.images.messages import SaEntry
from ovr.state.kind import Kind
from ovr.state.scope import PROCESS, THREAD

__all__ = ["KINDS", "NEVER_BLOCKED", "AlternateStack", "Blocked", "PdeathSignal", "Sigactions"]

_SIGKILL: Final = 9
_SIGSTOP: Final = 19
_SIGNALS: Final = 64
_ALL: Final = (1 << _SIGNALS) - 1
NEVER_BLOCKED: Final = 1 << _SIGKILL - 1 | 1 << _SIGSTOP - 1
_DEFAULT: Final = (0, 0, 0, 0)
_HANDLED: Final = tuple(n for n in range(1, _SIGNALS + 1) if n not in (_SIGKILL, _SIGSTOP))

# UAPI_SA_FLAGS in include/linux/signal_types.h with x86's SA_RESTORER; the kernel drops others.
_SA_FLAGS: Final = 0xDC00_0807
_SS_DISABLE: Final = 2
_SS_FLAGS: Final = 0x8000_0003  # SS_AUTODISARM, SS_DISABLE, SS_ONSTACK


class Blocked(Kind):
    """sigprocmask(2)."""

    name = "blocked_signals"
    groups = ("thread", "signals")
    summary = "blocked signals (task_struct.blocked)"
    source = "the signal frame of CRIU's restorer; set_current_blocked() in sys_rt_sigreturn()"
    scope = THREAD

    def take(self, image: CoreEntry) -> int | None:
        """Return the mask: bit N-1 for signal N."""
        thread, leader = image.thread_core, image.tc
        if not thread.HasField("blk_sigset") and not image.HasField("tc"):
            return None
        mask = thread.blk_sigset if thread.HasField("blk_sigset") else leader.blk_sigset
        return mask & ~NEVER_BLOCKED

    def neutralise(self, image: CoreEntry) -> None:
        """Block all signals until the mask is written."""
        if image.thread_core.HasField("blk_sigset"):
            image.thread_core.blk_sigset = _ALL
        if image.HasField("tc"):
            image.tc.blk_sigset = _ALL

    def write(self, target: Any, value: int) -> None:
        """Store as __set_task_blocked() does when it unblocks signals."""
        # SAFETY: only the thread itself changes its mask, and it is stopped. The kernel derives
        # TIF_SIGPENDING from the mask; ptrace_stop() recalculates it (recalc_sigpending_tsk()) when
        # CRIU later detaches from the thread. Concurrent senders read the old or the new mask, as
        # if they had run earlier or later. Undone by killing the tree.
        target.blocked.sig[0] = value

    def read(self, target: Any) -> int:
        return int(target.blocked.sig[0])


class Sigactions(Kind):
    """sigaction(2)."""

    name = "signal_actions"
    groups = ("process", "signals")
    summary = "signal handlers, their flags and masks (sighand_struct.action)"
    source = "prepare_sigactions() in criu/sigact.c; do_sigaction()"
    scope = PROCESS

    def take(self, image: CoreEntry) -> tuple[tuple[int, int, int, int], ...] | None:
        """Return handler, flags, restorer and mask for all signals except SIGKILL and SIGSTOP.

        None for a process with 32-bit handlers, and for images with the actions elsewhere.
        """
        actions = list(image.tc.sigactions)
        if not actions or any(action.compat_sigaction for action in actions):
            return None
        if len(actions) != len(_HANDLED):
            raise ImagesDamaged(
                f"{len(actions)} signal actions instead of {len(_HANDLED)}", "dump again"
            )
        return tuple(_action(action) for action in actions)

    def neutralise(self, image: CoreEntry) -> None:
        """Set all to default; CRIU requires the same number of entries."""
        for action in image.tc.sigactions:
            action.sigaction = action.flags = action.restorer = action.mask = 0

    def write(self, target: Any, value: tuple[tuple[int, int, int, int], ...]) -> None:
        """Store as do_sigaction() does."""
        # SAFETY: the sighand_struct is the process's own (CRIU does not dump CLONE_SIGHAND without
        # CLONE_THREAD), and its threads are stopped. Senders only read it, to test whether a signal
        # is ignored, and for a traced task none is (sig_ignored()); so no signal is lost under the
        # neutral action, and none has to be flushed under the real one. Undone by killing the tree.
        for number, wanted, found in zip(_HANDLED, value, self.read(target), strict=True):
            if wanted == found:
                continue  # most actions are default
            action = target.sighand.action[number - 1].sa
            action.sa_handler, action.sa_flags, action.sa_restorer, action.sa_mask.sig[0] = wanted

    def read(self, target: Any) -> tuple[tuple[int, int, int, int], ...]:
        """Return the actions; default ones, which are all zeros, are recognised in bulk."""
        array = target.sighand.action
        raw = bytes(array)
        size = len(raw) // len(array)
        default = bytes(size)
        found = []
        for number in _HANDLED:
            if raw[(number - 1) * size : number * size] == default:
                found.append(_DEFAULT)
                continue
            sa = array[number - 1].sa
            mask = sa.sa_mask.sig[0]
            found.append((int(sa.sa_handler), sa.sa_flags, int(sa.sa_restorer), mask))
        return tuple(found)


def _action(action: SaEntry) -> tuple[int, int, int, int]:
    mask = action.mask & ~NEVER_BLOCKED
    return action.sigaction, action.flags & _SA_FLAGS, action.restorer, mask


class AlternateStack(Kind):
    """sigaltstack(2)."""

    name = "alternate_signal_stack"
    groups = ("thread", "signals")
    summary = "alternate signal stack (task_struct.sas_ss_sp, sas_ss_size, sas_ss_flags)"
    source = "setup_sas() in criu/sigframe.c; do_sigaltstack()"
    scope = THREAD

    def take(self, image: CoreEntry) -> tuple[int, int, int] | None:
        """Return address, size and flags; address and size are 0 without a stack."""
        if not image.thread_core.HasField("sas"):
            return None
        sas = image.thread_core.sas
        flags = sas.ss_flags & _SS_FLAGS
        return (0, 0, flags) if flags & _SS_DISABLE else (sas.ss_sp, sas.ss_size, flags)

    def neutralise(self, image: CoreEntry) -> None:
        """Disable the stack."""
        sas = image.thread_core.sas
        sas.ss_sp, sas.ss_size, sas.ss_flags = 0, 0, _SS_DISABLE

    def write(self, target: Any, value: tuple[int, int, int]) -> None:
        """Store as do_sigaltstack() does."""
        # SAFETY: only the thread itself uses these three fields, when it sets up a signal frame,
        # and it is stopped; an invalid address makes that fail. Undone by killing the tree.
        target.sas_ss_sp, target.sas_ss_size, target.sas_ss_flags = value

    def read(self, target: Any) -> tuple[int, int, int]:
        return target.sas_ss_sp, target.sas_ss_size, target.sas_ss_flags


class PdeathSignal(Kind):
    """PR_SET_PDEATHSIG."""

    name = "pdeath_signal"
    groups = ("thread", "signals")
    summary = "signal on the parent's death (task_struct.pdeath_signal)"
    source = "restore_pdeath_sig() in criu/pie/restorer.c; prctl(PR_SET_PDEATHSIG)"
    scope = THREAD

    def take(self, image: CoreEntry) -> int | None:
        """Return the signal's number."""
        if not image.thread_core.HasField("pdeath_sig"):
            return None
        if image.thread_core.pdeath_sig > _SIGNALS:
            raise ImagesDamaged(f"impossible signal {image.thread_core.pdeath_sig}", "dump again")
        return image.thread_core.pdeath_sig

    def neutralise(self, image: CoreEntry) -> None:
        """Remove the field: no signal."""
        image.thread_core.ClearField("pdeath_sig")

    def write(self, target: Any, value: int) -> None:
        """Store as prctl() does."""
        # SAFETY: written by the thread itself and by exec, read when its parent exits. One store,
        # atomic to a parent that exits at the same time. Undone by killing the tree.
        target.pdeath_signal = value

    def read(self, target: Any) -> int:
        return int(target.pdeath_signal)


KINDS: Final = (Blocked(), Sigactions(), AlternateStack(), PdeathSignal())
