"""Messages of open files, terminals and namespaces."""

from ovr.images.wire import (
    BOOL,
    BYTES,
    SINT32,
    UINT32,
    UINT64,
    Message,
    Scalars,
    entry,
    optional,
    repeated,
    required,
)

__all__ = [
    "EventfdFileEntry",
    "FdinfoEntry",
    "FileEntry",
    "FownEntry",
    "IpcDescEntry",
    "IpcShmEntry",
    "IpcVarEntry",
    "MemfdFileEntry",
    "MemfdInodeEntry",
    "PipeDataEntry",
    "PipeEntry",
    "RegFileEntry",
    "SignalfdEntry",
    "TermiosEntry",
    "TimensEntry",
    "TimerfdEntry",
    "Timespec",
    "TtyFileEntry",
    "TtyInfoEntry",
    "TtyPtyEntry",
    "UtsnsEntry",
    "WinsizeEntry",
]


@entry
class FdinfoEntry(Message):
    """One file descriptor of ``fdinfo-FILES_ID.img``; `flags` 1 is FD_CLOEXEC."""

    id: int = required(1, UINT32)
    flags: int = required(2, UINT32)
    type: int = required(3, UINT32)
    fd: int = required(4, UINT32)
    xattr_security_selinux: bytes = optional(5, BYTES)


@entry
class FownEntry(Message):
    """The owner of a file's signals (F_SETOWN, F_SETSIG)."""

    uid: int = required(1, UINT32)
    euid: int = required(2, UINT32)
    signum: int = required(3, UINT32)
    pid_type: int = required(4, UINT32)
    pid: int = required(5, UINT32)


@entry
class RegFileEntry(Message):
    """An open file with a path; a file without a position has all ones in `pos`."""

    id: int = required(1, UINT32)
    flags: int = required(2, UINT32)
    pos: int = required(3, UINT64)
    fown: FownEntry = required(5, FownEntry)
    name: bytes = required(6, BYTES)
    mnt_id: int = optional(7, SINT32)
    size: int = optional(8, UINT64)
    ext: bool = optional(9, BOOL)
    mode: int = optional(10, UINT32)
    build_id: Scalars[int] = repeated(11, UINT32)
    checksum: int = optional(12, UINT32)
    checksum_config: int = optional(13, UINT32)
    checksum_parameter: int = optional(14, UINT32)


@entry
class EventfdFileEntry(Message):
    """An eventfd and its counter."""

    id: int = required(1, UINT32)
    flags: int = required(2, UINT32)
    fown: FownEntry = required(3, FownEntry)
    counter: int = required(4, UINT64)


@entry
class SignalfdEntry(Message):
    """A signalfd and its mask."""

    id: int = required(1, UINT32)
    flags: int = required(2, UINT32)
    fown: FownEntry = required(3, FownEntry)
    sigmask: int = required(4, UINT64)


@entry
class TimerfdEntry(Message):
    """A timerfd, its interval and its next expiry."""

    id: int = required(1, UINT32)
    flags: int = required(2, UINT32)
    fown: FownEntry = required(3, FownEntry)
    clockid: int = required(4, UINT32)
    ticks: int = required(5, UINT64)
    settime_flags: int = required(6, UINT32)
    vsec: int = required(7, UINT64)
    vnsec: int = required(8, UINT64)
    isec: int = required(9, UINT64)
    insec: int = required(10, UINT64)


@entry
class PipeEntry(Message):
    """One end of a pipe."""

    id: int = required(1, UINT32)
    pipe_id: int = required(2, UINT32)
    flags: int = required(3, UINT32)
    fown: FownEntry = required(4, FownEntry)


@entry
class TtyFileEntry(Message):
    """An open terminal."""

    id: int = required(1, UINT32)
    tty_info_id: int = required(2, UINT32)
    flags: int = required(3, UINT32)
    fown: FownEntry = required(4, FownEntry)
    regf_id: int = optional(6, UINT32)


@entry
class MemfdFileEntry(Message):
    """An open memfd."""

    id: int = required(1, UINT32)
    flags: int = required(2, UINT32)
    pos: int = required(3, UINT64)
    fown: FownEntry = required(4, FownEntry)
    inode_id: int = required(5, UINT32)


@entry
class FileEntry(Message):
    """One open file of ``files.img``; types without a field here are kept as unknown fields."""

    type: int = required(1, UINT32)
    id: int = required(2, UINT32)
    reg: RegFileEntry = optional(3, RegFileEntry)
    efd: EventfdFileEntry = optional(8, EventfdFileEntry)
    sgfd: SignalfdEntry = optional(10, SignalfdEntry)
    tfd: TimerfdEntry = optional(12, TimerfdEntry)
    pipe: PipeEntry = optional(18, PipeEntry)
    tty: TtyFileEntry = optional(19, TtyFileEntry)
    memfd: MemfdFileEntry = optional(20, MemfdFileEntry)


@entry
class MemfdInodeEntry(Message):
    """The inode of one or more memfds (``memfd.img``)."""

    name: bytes = required(1, BYTES)
    uid: int = required(2, UINT32)
    gid: int = required(3, UINT32)
    size: int = required(4, UINT64)
    shmid: int = required(5, UINT32)
    seals: int = required(6, UINT32)
    inode_id: int = required(7, UINT64)
    hugetlb_flag: int = optional(8, UINT32)
    mode: int = optional(9, UINT32)


@entry
class PipeDataEntry(Message):
    """Data in a pipe or FIFO: `bytes` raw bytes follow the entry."""

    pipe_id: int = required(1, UINT32)
    bytes: int = required(2, UINT32)
    size: int = optional(3, UINT32)


@entry
class WinsizeEntry(Message):
    """The size of a terminal's window."""

    ws_row: int = required(1, UINT32)
    ws_col: int = required(2, UINT32)
    ws_xpixel: int = required(3, UINT32)
    ws_ypixel: int = required(4, UINT32)


@entry
class TermiosEntry(Message):
    """The settings of a terminal."""

    c_iflag: int = required(1, UINT32)
    c_oflag: int = required(2, UINT32)
    c_cflag: int = required(3, UINT32)
    c_lflag: int = required(4, UINT32)
    c_line: int = required(5, UINT32)
    c_ispeed: int = required(6, UINT32)
    c_ospeed: int = required(7, UINT32)
    c_cc: Scalars[int] = repeated(8, UINT32)


@entry
class TtyPtyEntry(Message):
    """The number of a pseudo terminal."""

    index: int = required(1, UINT32)


@entry
class TtyInfoEntry(Message):
    """One terminal of ``tty-info.img``."""

    id: int = required(1, UINT32)
    type: int = required(2, UINT32)
    locked: bool = required(3, BOOL)
    exclusive: bool = required(4, BOOL)
    packet_mode: bool = required(5, BOOL)
    sid: int = required(6, UINT32)
    pgrp: int = required(7, UINT32)
    rdev: int = required(8, UINT32)
    termios: TermiosEntry = optional(9, TermiosEntry)
    termios_locked: TermiosEntry = optional(10, TermiosEntry)
    winsize: WinsizeEntry = optional(11, WinsizeEntry)
    pty: TtyPtyEntry = optional(12, TtyPtyEntry)
    dev: int = optional(13, UINT32)
    uid: int = optional(14, UINT32)
    gid: int = optional(15, UINT32)


@entry
class UtsnsEntry(Message):
    """``utsns-ID.img``."""

    nodename: bytes = required(1, BYTES)
    domainname: bytes = required(2, BYTES)


@entry
class Timespec(Message):
    """A clock offset."""

    tv_sec: int = required(1, UINT64)
    tv_nsec: int = required(2, UINT64)


@entry
class TimensEntry(Message):
    """``timens-ID.img``: the clocks at the time of the dump."""

    monotonic: Timespec = required(1, Timespec)
    boottime: Timespec = required(2, Timespec)


@entry
class IpcDescEntry(Message):
    """Fields common to all types of SysV IPC objects."""

    key: int = required(1, UINT32)
    uid: int = required(2, UINT32)
    gid: int = required(3, UINT32)
    cuid: int = required(4, UINT32)
    cgid: int = required(5, UINT32)
    mode: int = required(6, UINT32)
    id: int = required(7, UINT32)


@entry
class IpcShmEntry(Message):
    """A SysV shared memory segment; unless `in_pagemaps`, its content follows the entry."""

    desc: IpcDescEntry = required(1, IpcDescEntry)
    size: int = required(2, UINT64)
    in_pagemaps: bool = optional(3, BOOL)
    hugetlb_flag: int = optional(4, UINT32)


@entry
class IpcVarEntry(Message):
    """``ipcns-var-ID.img``: the sysctls of an IPC namespace."""

    sem_ctls: Scalars[int] = repeated(1, UINT32)
    msg_ctlmax: int = required(2, UINT32)
    msg_ctlmnb: int = required(3, UINT32)
    msg_ctlmni: int = required(4, UINT32)
    auto_msgmni: int = required(5, UINT32)
    shm_ctlmax: int = required(6, UINT64)
    shm_ctlall: int = required(7, UINT64)
    shm_ctlmni: int = required(8, UINT32)
    shm_rmid_forced: int = required(9, UINT32)
    mq_queues_max: int = required(10, UINT32)
    mq_msg_max: int = required(11, UINT32)
    mq_msgsize_max: int = required(12, UINT32)
    mq_msg_default: int = optional(13, UINT32)
    mq_msgsize_default: int = optional(14, UINT32)
    msg_next_id: int = optional(15, UINT32)
    sem_next_id: int = optional(16, UINT32)
    shm_next_id: int = optional(17, UINT32)
