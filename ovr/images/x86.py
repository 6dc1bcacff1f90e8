"""The x86 part of a core image: general registers, FPU state, TLS descriptors."""

from ovr.images.wire import (
    BOOL,
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

__all__ = ["FpregsEntry", "GpregsEntry", "ThreadInfoX86", "UserDesc", "XsaveEntry"]


@entry
class GpregsEntry(Message):
    """``user_x86_regs_entry``; `mode` 2 marks a 32-bit task."""

    r15: int = required(1, UINT64)
    r14: int = required(2, UINT64)
    r13: int = required(3, UINT64)
    r12: int = required(4, UINT64)
    bp: int = required(5, UINT64)
    bx: int = required(6, UINT64)
    r11: int = required(7, UINT64)
    r10: int = required(8, UINT64)
    r9: int = required(9, UINT64)
    r8: int = required(10, UINT64)
    ax: int = required(11, UINT64)
    cx: int = required(12, UINT64)
    dx: int = required(13, UINT64)
    si: int = required(14, UINT64)
    di: int = required(15, UINT64)
    orig_ax: int = required(16, UINT64)
    ip: int = required(17, UINT64)
    cs: int = required(18, UINT64)
    flags: int = required(19, UINT64)
    sp: int = required(20, UINT64)
    ss: int = required(21, UINT64)
    fs_base: int = required(22, UINT64)
    gs_base: int = required(23, UINT64)
    ds: int = required(24, UINT64)
    es: int = required(25, UINT64)
    fs: int = required(26, UINT64)
    gs: int = required(27, UINT64)
    mode: int = optional(28, UINT32)


@entry
class XsaveEntry(Message):
    """``user_x86_xsave_entry``: the extended state components."""

    xstate_bv: int = required(1, UINT64)
    ymmh_space: Scalars[int] = repeated(2, UINT32)
    bndreg_state: Scalars[int] = repeated(3, UINT64)
    bndcsr_state: Scalars[int] = repeated(4, UINT64)
    opmask_reg: Scalars[int] = repeated(5, UINT64)
    zmm_upper: Scalars[int] = repeated(6, UINT64)
    hi16_zmm: Scalars[int] = repeated(7, UINT64)
    pkru: Scalars[int] = repeated(8, UINT32)


@entry
class FpregsEntry(Message):
    """``user_x86_fpregs_entry``: the FXSAVE area and the XSAVE extensions."""

    cwd: int = required(1, UINT32)
    swd: int = required(2, UINT32)
    twd: int = required(3, UINT32)
    fop: int = required(4, UINT32)
    rip: int = required(5, UINT64)
    rdp: int = required(6, UINT64)
    mxcsr: int = required(7, UINT32)
    mxcsr_mask: int = required(8, UINT32)
    st_space: Scalars[int] = repeated(9, UINT32)
    xmm_space: Scalars[int] = repeated(10, UINT32)
    padding: Scalars[int] = repeated(11, UINT32)
    xsave: XsaveEntry = optional(13, XsaveEntry)


@entry
class UserDesc(Message):
    """``user_desc_t``: one GDT entry of set_thread_area(2)."""

    entry_number: int = required(1, UINT32)
    base_addr: int = required(2, UINT32)
    limit: int = required(3, UINT32)
    seg_32bit: bool = required(4, BOOL)
    contents_h: bool = required(5, BOOL)
    contents_l: bool = required(6, BOOL)
    read_exec_only: bool = required(7, BOOL)
    limit_in_pages: bool = required(8, BOOL)
    seg_not_present: bool = required(9, BOOL)
    usable: bool = required(10, BOOL)


@entry
class ThreadInfoX86(Message):
    """``thread_info_x86``."""

    clear_tid_addr: int = required(1, UINT64)
    gpregs: GpregsEntry = required(2, GpregsEntry)
    fpregs: FpregsEntry = required(3, FpregsEntry)
    tls: Composites[UserDesc] = repeated(4, UserDesc)
