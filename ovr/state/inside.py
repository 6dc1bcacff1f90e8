"""List the kinds of state that stay inside, with the reasons."""

from dataclasses import dataclass
from typing import Final

__all__ = ["INSIDE_KINDS", "InsideKind"]


@dataclass(frozen=True)
class InsideKind:
    """A kind of state that CRIU restores.

    Attributes:
        name: as `Kind.name`.
        groups: as `Kind.groups`.
        summary: a description in one line, with the kernel's name.
        reason: the reason why it cannot be written safely from outside.
    """

    name: str
    groups: tuple[str, ...]
    summary: str
    reason: str


INSIDE_KINDS: Final = (
    InsideKind(
        "rlimit_cpu", ("process",), "limit of CPU time (signal_struct.rlim[RLIMIT_CPU])",
        "update_rlimit_cpu() also arms a CPU timer (posix_cputimers.bases), which the tick reads",
    ),
    InsideKind(
        "scheduling", ("thread",), "nice value, policy and priority (task_struct.static_prio …)",
        "the weight is also in the sums of the run queue, where a stopped task may still be"
        " (delayed dequeue) and where its load average stays; sched_class needs a queue change",
    ),
    InsideKind(
        "thp_disabled", ("mm",), "PR_SET_THP_DISABLE (a bit of mm_struct.flags)",
        "must be set before the skeleton's memory is allocated, or huge pages are used; and no"
        " kernel type has the bit's number",
    ),
    InsideKind(
        "identity", ("thread", "credentials"), "user and group ids (cred.uid … group_info)",
        "user_struct, ucounts and group_info are counted references; processes are counted by user",
    ),
    InsideKind(
        "registers", ("thread",), "general registers, FS and GS base (pt_regs, thread_struct)",
        "CRIU runs code on the leader's registers after the sigreturn that sets them; the position"
        " of pt_regs on the kernel stack (padding, FRED) is in no kernel type",
    ),
    InsideKind(
        "fpu", ("thread",), "FPU, SSE and AVX state (fpu.fpstate)",
        "a compacted XSAVE area whose layout the CPU defines; a CPU may still hold the registers"
        " and not load them again (fpu_fpregs_owner_ctx, per CPU)",
    ),
    InsideKind(
        "rseq", ("thread",), "restartable sequences (task_struct.rseq)",
        "the kernel also keeps the CPU number and mm_cid that it last wrote for the thread",
    ),
    InsideKind(
        "membarrier", ("mm",), "membarrier registrations (mm_struct.membarrier_state)",
        "registering waits until every CPU has the new state, which run queues copy",
    ),
    InsideKind(
        "pending_signals", ("thread", "signals"), "queued signals (task_struct.pending)",
        "each is an allocated sigqueue, charged to its user",
    ),
    InsideKind(
        "itimers", ("process",), "interval timers (signal_struct.real_timer, it)",
        "armed hrtimers live in a per-CPU red-black tree and in the clock hardware",
    ),
    InsideKind(
        "posix_timers", ("process",), "timers of timer_create() (signal_struct.posix_timers)",
        "allocated objects in a hash table, with hrtimers of their own",
    ),
    InsideKind(
        "file_flags", ("files",), "O_APPEND, O_NONBLOCK … (file.f_flags)",
        "file systems derive f_mode and f_iocb_flags from them and may reject a change",
    ),
    InsideKind(
        "file_owner", ("files",), "F_SETOWN, F_SETSIG (file.f_owner)",
        "a counted reference to a struct pid; newer kernels allocate the owner",
    ),
    InsideKind(
        "pipe_contents", ("files",), "data in pipes (pipe_inode_info.bufs)",
        "each buffer is a page with a reference count",
    ),
    InsideKind(
        "termios", ("files",), "terminal settings (tty_struct.termios)",
        "line discipline and driver derive state of their own in set_termios()",
    ),
    InsideKind(
        "cgroup_limits", ("container",), "memory.max and pids.max (page_counter.max, limit)",
        "a cgroup outlives the tree and may hold others: killing the tree undoes nothing; lowering"
        " memory.max must also reclaim",
    ),
    InsideKind(
        "time_offsets", ("container",), "offsets of a time namespace (time_namespace.offsets)",
        "armed timers and the namespace's vvar page contain the same offsets",
    ),
    InsideKind(
        "seccomp", ("thread",), "seccomp filters (task_struct.seccomp)",
        "reference-counted programs, compiled by the kernel",
    ),
)  # fmt: skip
"""In the order of their kernel objects."""
