"""CRIU's image messages (``images/*.proto``) that ``ovr`` reads or rewrites.

Class and field names are CRIU's, in Python's spelling for classes. Protobuf messages are mutable,
and all readers of an image set share them: change a `copy_of`, never the original.
"""

from ovr.images.wire import (
    BOOL,
    BYTES,
    INT32,
    SINT32,
    SINT64,
    UINT32,
    UINT64,
    Composites,
    Message,
    Scalars,
    entry,
    optional,
    repeated,
    required,
)
from ovr.images.x86 import ThreadInfoX86

__all__ = [
    "AioRingEntry",
    "CoreEntry",
    "CredsEntry",
    "FsEntry",
    "IdsEntry",
    "InventoryEntry",
    "ItimerEntry",
    "MmEntry",
    "PagemapEntry",
    "PagemapHead",
    "PosixTimerEntry",
    "PstreeEntry",
    "RlimitEntry",
    "RseqEntry",
    "SaEntry",
    "SiginfoEntry",
    "SignalQueueEntry",
    "TaskCoreEntry",
    "TaskRlimitsEntry",
    "TaskTimersEntry",
    "ThreadCoreEntry",
    "ThreadSasEntry",
    "VmaEntry",
]


@entry
class IdsEntry(Message):
    """``task_kobj_ids_entry``: ids of a task's kernel objects, equal if shared: ``ids-PID.img``."""

    vm_id: int = required(1, UINT32)
    files_id: int = required(2, UINT32)
    fs_id: int = required(3, UINT32)
    sighand_id: int = required(4, UINT32)
    pid_ns_id: int = optional(5, UINT32)
    net_ns_id: int = optional(6, UINT32)
    ipc_ns_id: int = optional(7, UINT32)
    uts_ns_id: int = optional(8, UINT32)
    mnt_ns_id: int = optional(9, UINT32)
    user_ns_id: int = optional(10, UINT32)
    cgroup_ns_id: int = optional(11, UINT32)
    time_ns_id: int = optional(12, UINT32)


@entry
class InventoryEntry(Message):
    """``inventory.img``."""

    img_version: int = required(1, UINT32)
    fdinfo_per_id: bool = optional(2, BOOL)
    root_ids: IdsEntry = optional(3, IdsEntry)
    ns_per_id: bool = optional(4, BOOL)
    root_cg_set: int = optional(5, UINT32)
    lsmtype: int = optional(6, UINT32)
    dump_uptime: int = optional(8, UINT64)
    pre_dump_mode: int = optional(9, UINT32)
    tcp_close: bool = optional(10, BOOL)
    network_lock_method: int = optional(11, UINT32)


@entry
class PstreeEntry(Message):
    """One task of ``pstree.img``; `threads` is garbage for dead tasks (seen, CRIU 3.17.1)."""

    pid: int = required(1, UINT32)
    ppid: int = required(2, UINT32)
    pgid: int = required(3, UINT32)
    sid: int = required(4, UINT32)
    threads: Scalars[int] = repeated(5, UINT32)


@entry
class SiginfoEntry(Message):
    """One queued signal: the kernel's ``siginfo_t``, 128 bytes."""

    siginfo: bytes = required(1, BYTES)


@entry
class SignalQueueEntry(Message):
    """The pending signals of a task or a thread."""

    signals: Composites[SiginfoEntry] = repeated(1, SiginfoEntry)


@entry
class SaEntry(Message):
    """One ``struct sigaction``."""

    sigaction: int = required(1, UINT64)
    flags: int = required(2, UINT64)
    restorer: int = required(3, UINT64)
    mask: int = required(4, UINT64)
    compat_sigaction: bool = optional(5, BOOL)
    mask_extended: int = optional(6, UINT64)


@entry
class ItimerEntry(Message):
    """One ``struct itimerval``: interval (i) and value (v)."""

    isec: int = required(1, UINT64)
    iusec: int = required(2, UINT64)
    vsec: int = required(3, UINT64)
    vusec: int = required(4, UINT64)


@entry
class PosixTimerEntry(Message):
    """A timer of timer_create(2)."""

    it_id: int = required(1, UINT32)
    clock_id: int = required(2, UINT32)
    si_signo: int = required(3, UINT32)
    it_sigev_notify: int = required(4, UINT32)
    sival_ptr: int = required(5, UINT64)
    overrun: int = required(6, UINT32)
    isec: int = required(7, UINT64)
    insec: int = required(8, UINT64)
    vsec: int = required(9, UINT64)
    vnsec: int = required(10, UINT64)
    notify_thread_id: int = optional(11, INT32)


@entry
class TaskTimersEntry(Message):
    """All timers of a task."""

    real: ItimerEntry = required(1, ItimerEntry)
    virt: ItimerEntry = required(2, ItimerEntry)
    prof: ItimerEntry = required(3, ItimerEntry)
    posix: Composites[PosixTimerEntry] = repeated(4, PosixTimerEntry)


@entry
class RlimitEntry(Message):
    """One resource limit; all ones means infinity."""

    cur: int = required(1, UINT64)
    max: int = required(2, UINT64)


@entry
class TaskRlimitsEntry(Message):
    """The resource limits, by RLIMIT_ number."""

    rlimits: Composites[RlimitEntry] = repeated(1, RlimitEntry)


@entry
class TaskCoreEntry(Message):
    """State shared by the threads of a task; only the leader's core image has it."""

    task_state: int = required(1, UINT32)
    exit_code: int = required(2, UINT32)
    personality: int = required(3, UINT32)
    flags: int = required(4, UINT32)
    blk_sigset: int = required(5, UINT64)
    comm: bytes = required(6, BYTES)
    timers: TaskTimersEntry = optional(7, TaskTimersEntry)
    rlimits: TaskRlimitsEntry = optional(8, TaskRlimitsEntry)
    cg_set: int = optional(9, UINT32)
    signals_s: SignalQueueEntry = optional(10, SignalQueueEntry)
    old_seccomp_mode: int = optional(11, UINT32)
    old_seccomp_filter: int = optional(12, UINT32)
    loginuid: int = optional(13, UINT32)
    oom_score_adj: int = optional(14, INT32)
    sigactions: Composites[SaEntry] = repeated(15, SaEntry)
    child_subreaper: bool = optional(18, BOOL)
    blk_sigset_extended: int = optional(20, UINT64)
    stop_signo: int = optional(21, UINT32)
    membarrier_registration_mask: int = optional(22, UINT32)


@entry
class ThreadSasEntry(Message):
    """The alternate signal stack."""

    ss_sp: int = required(1, UINT64)
    ss_size: int = required(2, UINT64)
    ss_flags: int = required(3, UINT32)


@entry
class CredsEntry(Message):
    """Credentials; capability sets are words of 32 bits, lowest first."""

    uid: int = required(1, UINT32)
    gid: int = required(2, UINT32)
    euid: int = required(3, UINT32)
    egid: int = required(4, UINT32)
    suid: int = required(5, UINT32)
    sgid: int = required(6, UINT32)
    fsuid: int = required(7, UINT32)
    fsgid: int = required(8, UINT32)
    cap_inh: Scalars[int] = repeated(9, UINT32)
    cap_prm: Scalars[int] = repeated(10, UINT32)
    cap_eff: Scalars[int] = repeated(11, UINT32)
    cap_bnd: Scalars[int] = repeated(12, UINT32)
    secbits: int = required(13, UINT32)
    groups: Scalars[int] = repeated(14, UINT32)
    lsm_profile: bytes = optional(15, BYTES)
    lsm_sockcreate: bytes = optional(16, BYTES)
    apparmor_data: bytes = optional(17, BYTES)
    no_new_privs: int = optional(18, UINT32)
    cap_amb: Scalars[int] = repeated(19, UINT32)


@entry
class RseqEntry(Message):
    """The registered restartable-sequence area."""

    rseq_abi_pointer: int = required(1, UINT64)
    rseq_abi_size: int = required(2, UINT32)
    signature: int = required(3, UINT32)
    rseq_cs_pointer: int = optional(4, UINT64)


@entry
class ThreadCoreEntry(Message):
    """State of a single thread."""

    futex_rla: int = required(1, UINT64)
    futex_rla_len: int = required(2, UINT32)
    sched_nice: int = optional(3, SINT32)
    sched_policy: int = optional(4, UINT32)
    sched_prio: int = optional(5, UINT32)
    blk_sigset: int = optional(6, UINT64)
    sas: ThreadSasEntry = optional(7, ThreadSasEntry)
    pdeath_sig: int = optional(8, UINT32)
    signals_p: SignalQueueEntry = optional(9, SignalQueueEntry)
    creds: CredsEntry = optional(10, CredsEntry)
    seccomp_mode: int = optional(11, UINT32)
    seccomp_filter: int = optional(12, UINT32)
    comm: bytes = optional(13, BYTES)
    blk_sigset_extended: int = optional(14, UINT64)
    rseq_entry: RseqEntry = optional(15, RseqEntry)
    cg_set: int = optional(16, UINT32)


@entry
class CoreEntry(Message):
    """``core-TID.img``: one for each thread."""

    mtype: int = required(1, UINT32)
    thread_info: ThreadInfoX86 = optional(2, ThreadInfoX86)
    tc: TaskCoreEntry = optional(3, TaskCoreEntry)
    ids: IdsEntry = optional(4, IdsEntry)
    thread_core: ThreadCoreEntry = optional(5, ThreadCoreEntry)


@entry
class VmaEntry(Message):
    """One memory area; `status` holds `ovr.images.vma` bits, `pgoff` is in bytes."""

    start: int = required(1, UINT64)
    end: int = required(2, UINT64)
    pgoff: int = required(3, UINT64)
    shmid: int = required(4, UINT64)
    prot: int = required(5, UINT32)
    flags: int = required(6, UINT32)
    status: int = required(7, UINT32)
    fd: int = required(8, SINT64)
    madv: int = optional(9, UINT64)
    fdflags: int = optional(10, UINT32)


@entry
class AioRingEntry(Message):
    """One ring of io_setup(2)."""

    id: int = required(1, UINT64)
    nr_req: int = required(2, UINT32)
    ring_len: int = required(3, UINT32)


@entry
class MmEntry(Message):
    """``mm-PID.img``: the memory descriptor and its areas."""

    mm_start_code: int = required(1, UINT64)
    mm_end_code: int = required(2, UINT64)
    mm_start_data: int = required(3, UINT64)
    mm_end_data: int = required(4, UINT64)
    mm_start_stack: int = required(5, UINT64)
    mm_start_brk: int = required(6, UINT64)
    mm_brk: int = required(7, UINT64)
    mm_arg_start: int = required(8, UINT64)
    mm_arg_end: int = required(9, UINT64)
    mm_env_start: int = required(10, UINT64)
    mm_env_end: int = required(11, UINT64)
    exe_file_id: int = required(12, UINT32)
    mm_saved_auxv: Scalars[int] = repeated(13, UINT64)
    vmas: Composites[VmaEntry] = repeated(14, VmaEntry)
    dumpable: int = optional(15, INT32)
    aios: Composites[AioRingEntry] = repeated(16, AioRingEntry)
    thp_disabled: bool = optional(17, BOOL)


@entry
class PagemapHead(Message):
    """The first entry of a pagemap image: the N of its ``pages-N.img``."""

    pages_id: int = required(1, UINT32)


@entry
class PagemapEntry(Message):
    """One run of pages; CRIU 4.2 counts in `nr_pages` and leaves `compat_nr_pages` zero."""

    vaddr: int = required(1, UINT64)
    compat_nr_pages: int = required(2, UINT32)
    in_parent: bool = optional(3, BOOL)
    flags: int = optional(4, UINT32)
    nr_pages: int = optional(5, UINT64)


@entry
class FsEntry(Message):
    """``fs-PID.img``: working directory, root and umask."""

    cwd_id: int = required(1, UINT32)
    root_id: int = required(2, UINT32)
    umask: int = optional(3, UINT32)
