"""A kernel small enough to be made by hand: its types, and a guest RAM with it in it."""

import struct
from dataclasses import dataclass, field

from ovr.kernel.types.btf import Btf
from ovr.kernel.types.types import Types
from ovr.memory.addresses import Gpa

from ..machine import Machine
from .writers import TYPEDEF, VAR, BtfWriter, KallsymsWriter, vmcoreinfo_text

START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
DIRECT_MAP = 0xFFFF_8880_0000_0000
ALL = (1 << 41) - 1
"""Every capability."""
POISON = 0xDEAD_0000_0000_0122


def toy_btf(*, tk_data: bool = False, old_rss: bool = False) -> bytes:  # one statement a type
    w = BtfWriter()
    u8, char = w.integer("unsigned char", 1), w.integer("char", 1, signed=True)
    s32, u32 = w.integer("int", 4, signed=True), w.integer("unsigned int", 4)
    u64 = w.integer("long unsigned int", 8)
    void, text = w.pointer(), w.pointer(char)
    task_p, node_p, hnode_p, rb_p = w.pointer(), w.pointer(), w.pointer(), w.pointer()
    node = w.struct("list_head", 16, ("next", node_p, 0), ("prev", node_p, 8))
    w.point(node_p, node)
    hnode = w.struct("hlist_node", 16, ("next", hnode_p, 0), ("pprev", void, 8))
    w.point(hnode_p, hnode)
    hhead = w.struct("hlist_head", 8, ("first", hnode_p, 0))
    rb = w.struct(
        "rb_node", 24, ("__rb_parent_color", u64, 0), ("rb_right", rb_p, 8), ("rb_left", rb_p, 16)
    )
    w.point(rb_p, rb)
    w.struct("rb_root", 8, ("rb_node", rb_p, 0))
    w.struct("item", 64, ("key", s32, 0), ("link", node, 8), ("hlink", hnode, 24), ("rb", rb, 40))
    xarray = w.struct("xarray", 16, ("xa_head", void, 8))
    w.struct("xa_node", 520, ("shift", u8, 0), ("slots", w.array(void, 64), 8))
    idr = w.struct("idr", 24, ("idr_rt", xarray, 0), ("idr_base", u32, 16))
    ns_p = w.pointer()
    ns = w.struct(
        "pid_namespace", 40, ("idr", idr, 0), ("child_reaper", task_p, 24), ("level", u32, 32)
    )
    w.point(ns_p, ns)
    upid = w.struct("upid", 16, ("nr", s32, 0), ("ns", ns_p, 8))
    w.enum("pid_type", PIDTYPE_PID=0, PIDTYPE_TGID=1, PIDTYPE_PGID=2, PIDTYPE_SID=3)
    pid = w.struct(
        "pid", 40, ("level", u32, 0), ("tasks", w.array(hhead, 4), 8),
        ("numbers", w.array(upid, 0), 40),
    )  # fmt: skip
    signal = w.struct("signal_struct", 32, ("thread_head", node, 0))
    fs = w.struct("fs_struct", 8, ("umask", s32, 4))
    tree = w.struct("maple_tree", 16, ("ma_root", void, 8))
    r64 = w.struct(
        "maple_range_64", 256, ("parent", void, 0), ("pivot", w.array(u64, 15), 8),
        ("slot", w.array(void, 16), 128),
    )  # fmt: skip
    a64 = w.struct(
        "maple_arange_64", 248, ("parent", void, 0), ("pivot", w.array(u64, 9), 8),
        ("slot", w.array(void, 10), 80), ("gap", w.array(u64, 10), 160),
    )  # fmt: skip
    w.struct("maple_node", 256, ("parent", void, 0), ("mr64", r64, 0), ("ma64", a64, 0))
    w.enum("maple_type", maple_dense=0, maple_leaf_64=1, maple_range_64=2, maple_arange_64=3)
    pgd = w.add(TYPEDEF, "pgd_t", w.struct("", 8, ("pgd", u64, 0)))
    block = w.struct("super_block", 16, ("s_flags", u64, 0), ("s_magic", u64, 8))
    inode = w.struct(
        "inode", 24, ("i_mode", u32, 0), ("i_sb", w.pointer(block), 8), ("i_blocks", u64, 16)
    )
    for name in ("shmem_inode_info", "hugetlbfs_inode_info"):
        w.struct(name, 32, ("seals", u32, 0), ("vfs_inode", inode, 8))
    file = w.struct("file", 8, ("f_inode", w.pointer(inode), 0))
    if old_rss:
        counter = w.struct("", 8, ("counter", u64, 0))
        rss = w.struct("mm_rss_stat", 32, ("count", w.array(counter, 4), 0))
    else:
        rss = w.array(w.struct("percpu_counter", 8, ("count", u64, 0)), 4)
    mm = w.struct(
        "mm_struct", 128, ("mm_mt", tree, 0), ("pgd", w.pointer(pgd), 16),
        ("exe_file", w.pointer(file), 24), ("rss_stat", rss, 32),
        ("saved_auxv", w.array(u64, 8), 64),
    )  # fmt: skip
    w.add(TYPEDEF, "u64", u64)
    kuid = w.struct("", 4, ("val", u32, 0))
    cred = w.struct(
        "cred", 32, ("uid", kuid, 0), ("euid", kuid, 4), ("suid", kuid, 8), ("fsuid", kuid, 12),
        ("user_ns", w.pointer(w.struct("user_namespace", 8, ("level", s32, 0))), 16),
        ("cap_effective", w.struct("", 8, ("val", u64, 0)), 24),
    )  # fmt: skip
    w.struct(
        "vm_area_struct", 64, ("vm_start", u64, 0), ("vm_end", u64, 8), ("vm_flags", u64, 16),
        ("vm_pgoff", u64, 24), ("vm_file", w.pointer(file), 32), ("vm_ops", void, 40),
    )  # fmt: skip
    task = w.struct(
        "task_struct", 256, ("__state", u32, 0), ("exit_state", s32, 4), ("flags", u32, 8),
        ("pid", s32, 12), ("tgid", s32, 16), ("tasks", node, 24), ("real_parent", task_p, 40),
        ("signal", w.pointer(signal), 48), ("thread_node", node, 56),
        ("thread_pid", w.pointer(pid), 72),
        ("pid_links", w.array(hnode, 4), 80), ("comm", w.array(char, 16), 144),
        ("mm", w.pointer(mm), 160), ("worker_private", void, 168), ("start_boottime", u64, 176),
        ("fs", w.pointer(fs), 184), ("real_cred", w.pointer(cred), 192), ("parent", task_p, 200),
        ("ptrace", u32, 208), ("children", node, 216), ("sibling", node, 232),
    )  # fmt: skip
    w.point(task_p, task)
    w.struct("kthread", 16, ("data", void, 0), ("full_name", text, 8))
    w.struct(
        "worker", 48, ("current_work", void, 0), ("pool", void, 8), ("desc", w.array(char, 32), 16)
    )
    w.struct(
        "page", 64, ("flags", u64, 0), ("compound_head", u64, 8), ("mapping", void, 24),
    )  # fmt: skip
    w.enum(
        "pageflags", PG_locked=0, PG_dirty=4, PG_swapcache=10, PG_anon_exclusive=11,
        PG_writeback=15, PG_swapbacked=18,
    )  # fmt: skip
    keeper = w.struct("timekeeper", 64, ("xtime_sec", u64, 16))
    if tk_data:
        w.struct("tk_data", 96, ("timekeeper", keeper, 24))
    w.add(VAR, "cpu_counter", u32, struct.pack("<I", 1))
    w.add(VAR, "per_cpu_item", w.struct("per_cpu_thing", 8, ("a", u32, 4)), struct.pack("<I", 1))
    return w.build()


TYPES = Types(Btf(toy_btf()))

UTS, TASK, NS, GLOBALS, KALLSYMS, BTF = 0x1000, 0x2000, 0x3000, 0x4000, 0x1_0000, 0x8_0000


@dataclass
class ToyKernel:
    """A kernel in the RAM of a `Machine`, at `image` (GPA, 2 MiB aligned), with one process."""

    machine: Machine
    image: int = 0x40_0000
    note: int = 0x60_0000
    heap: int = 0x20_0000
    base: int = 0xFFFF_FFFF_8100_0000
    release: str = "6.12.0-toy"
    clock: int = 1_800_000_000
    booted: int = 123_456_789
    encoding: str = "absolute percpu"
    tk_data: bool = False
    btf: bytes | None = None
    note_lines: dict[str, str | None] = field(default_factory=dict)
    without: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        machine = self.machine
        for gpa in range(0, 8 << 20, 2 << 20):
            machine.map(DIRECT_MAP + gpa, gpa, shift=21)
        machine.map(self.base, self.image, shift=21)
        self.free = self.heap
        self.symbols = {
            "_stext": self.base,
            "init_uts_ns": self.base + UTS,
            "init_task": self.base + TASK,
            "init_pid_ns": self.base + NS,
            "page_offset_base": self.base + GLOBALS,
            "vmemmap_base": self.base + GLOBALS + 8,
            "timekeeper_data" if self.tk_data else "tk_core": self.base + GLOBALS + 256,
            "cpu_counter": 0x10,
            "per_cpu_item": 0x20,
        }
        blob = toy_btf(tk_data=self.tk_data) if self.btf is None else self.btf
        self.symbols["__start_BTF"] = self.base + BTF
        self.symbols["__stop_BTF"] = self.base + BTF + len(blob)
        self.poke(self.base + BTF, f"{len(blob)}s", blob)
        self.poke(self.base + UTS + 130, "65s", self.release.encode())
        self.poke(self.base + GLOBALS, "QQ", DIRECT_MAP, DIRECT_MAP + (1 << 40))
        self.poke(self.base + GLOBALS + 256 + (24 if self.tk_data else 8) + 16, "Q", self.clock)
        self._tasks()
        listed = [(n, a) for n, a in self.symbols.items() if n not in self.without]
        table, where = KallsymsWriter(sorted(listed, key=lambda s: s[1]), self.encoding).build(
            self.base + KALLSYMS
        )
        self.poke(self.base + KALLSYMS, f"{len(table)}s", table)
        phys_base = self.image - (self.base - START_KERNEL_MAP)
        required = {
            "_stext": self.base,
            "init_uts_ns": self.base + UTS,
            "swapper_pg_dir": START_KERNEL_MAP + machine.root - phys_base,
        }
        lines: dict[str, str | None] = {
            "OSRELEASE": f"OSRELEASE={self.release}",
            "phys_base": f"NUMBER(phys_base)={phys_base}",
            "l5": f"NUMBER(pgtable_l5_enabled)={machine.levels - 4}",
        }
        text = vmcoreinfo_text(where | required, **lines | self.note_lines)
        machine.ram.write(Gpa(self.note), text + b"\0")

    def gpa(self, gva: int) -> Gpa:
        if gva >= START_KERNEL_MAP:
            return Gpa(gva - self.base + self.image)
        return Gpa(gva - DIRECT_MAP)

    def poke(self, gva: int, form: str, *values: int | bytes) -> None:
        self.machine.ram.write(self.gpa(gva), struct.pack("<" + form, *values))

    def peek(self, gva: int) -> int:
        return struct.unpack("<Q", self.machine.ram.read(self.gpa(gva), 8))[0]

    def allocate(self, size: int) -> int:
        """Return the address of zeroed memory in the direct map, 256-byte aligned."""
        at = self.free
        self.free += -(-size // 256) * 256
        self.machine.ram.write(Gpa(at), bytes(size))
        return DIRECT_MAP + at

    def _tasks(self) -> None:
        init, ns = self.symbols["init_task"], self.symbols["init_pid_ns"]
        self.poke(init, "256s", bytes(256))
        self.poke(ns, "40s", bytes(40))
        self.poke(init + 24, "QQ", init + 24, init + 24)
        self.poke(init + 40, "Q", init)
        self.poke(init + 144, "16s", b"swapper/0")
        self.poke(init + 176, "Q", 0)
        self.user_ns = self.allocate(8)
        self.poke(init + 192, "Q", self.cred())
        first = self.fork(1, "init")
        self.poke(first + 192, "Q", self.cred())
        self.poke(first + 176, "Q", self.booted)
        self.poke(ns + 24, "Q", first)

    def fork(
        self, pid: int, comm: str, *, parent: int = 0, leader: int = 0, numbers: tuple = ()
    ) -> int:
        """Add a task (a thread if it has a leader); `numbers` are (nr, ns) below the first."""
        init, ns = self.symbols["init_task"], self.symbols["init_pid_ns"]
        task = self.allocate(256)
        signal = self.peek(leader + 48) if leader else self.allocate(32)
        self.poke(task + 12, "ii", pid, struct.unpack("<Q", struct.pack("<Q", pid))[0])
        self.poke(task + 40, "QQ", parent or init, signal)
        self.poke(task + 144, "16s", comm.encode())
        self.poke(task + 216, "QQ", task + 216, task + 216)
        if leader:
            self.poke(task + 16, "i", self.peek(leader + 16) & 0xFFFF_FFFF)
            self._link(task + 56, signal)
        else:
            self.poke(signal, "QQ", signal, signal)
            self._link(task + 56, signal)
            self._link(task + 24, init + 24)
        upids = ((pid, ns), *numbers)
        struct_pid = self.allocate(40 + 16 * len(upids))
        self.poke(struct_pid, "I", len(upids) - 1)
        self.poke(struct_pid + 8, "Q", task + 80)
        for level, (number, where) in enumerate(upids):
            self.poke(struct_pid + 40 + 16 * level, "iiQ", number, 0, where)
            self.insert(where, number, struct_pid)
        self.poke(task + 72, "Q", struct_pid)
        return task

    def cred(self, ids: tuple = (0, 0, 0, 0), *, user_ns: int = 0, effective: int = ALL) -> int:
        """Return credentials: uid, euid, suid and fsuid, namespace, capabilities; root's."""
        cred = self.allocate(32)
        self.poke(cred, "4IQQ", *ids, user_ns or self.user_ns, effective)
        return cred

    def namespace(self, level: int, *, base: int = 0) -> int:
        ns = self.allocate(40)
        self.poke(ns + 16, "I", base)
        self.poke(ns + 32, "I", level)
        return ns

    def insert(self, ns: int, number: int, entry: int) -> None:
        """Put a pointer into a namespace's idr: two levels, numbers below 4096."""
        head = self.peek(ns + 8)
        if not head:
            head = self.allocate(520) + 2
            self.poke(head - 2, "B", 6)
            self.poke(ns + 8, "Q", head)
        slot = head - 2 + 8 + 8 * (number >> 6)
        child = self.peek(slot)
        if not child:
            child = self.allocate(520) + 2
            self.poke(slot, "Q", child)
        self.poke(child - 2 + 8 + 8 * (number & 63), "Q", entry)

    def _link(self, node: int, head: int) -> None:
        # list_add_tail()
        last = self.peek(head + 8)
        self.poke(node, "QQ", head, last)
        self.poke(last, "Q", node)
        self.poke(head + 8, "Q", node)
