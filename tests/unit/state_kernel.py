"""As much of a kernel as the kinds of state write to, in a piece of memory."""

from typing import Any

from ovr.kernel.types.btf import Btf
from ovr.kernel.types.types import Types
from ovr.memory.addresses import Gva
from tests.unit.kernel.writers import FUNC_PROTO, TYPEDEF, BtfWriter, Memory

BASE = 0xFFFF_8880_0000_0000
CAPABILITIES = (1 << 41) - 1


def _struct(w: BtfWriter, name: str, *members: tuple) -> tuple[int, int]:
    # Members are (name, (type, size)), or (name, (type, 0), bits) for a bitfield after the last.
    placed, at = [], 0
    for text, (type_id, size), *bits in members:
        if bits:
            placed.append((text, type_id, 8 * at - 64 + len(placed), bits[0]))
        else:
            placed.append((text, type_id, at))
            at += -(-size // 8) * 8
    if any(len(member) == 4 for member in placed):  # then every offset is in bits
        placed = [m if len(m) == 4 else (m[0], m[1], 8 * m[2], 0) for m in placed]
    return w.struct(name, at, *placed), at


def kernel_types(*, new: bool) -> Types:
    """The layout of a new kernel or of an old one."""
    w = BtfWriter()
    integer = w.integer("int", 4, signed=True), 4
    short = w.integer("short int", 2, signed=True), 2
    u16 = w.integer("short unsigned int", 2), 2
    u32 = w.integer("unsigned int", 4), 4
    ulong = w.integer("long unsigned int", 8), 8
    char = w.integer("char", 1, signed=True), 1
    boolean = w.integer("_Bool", 1, boolean=True), 1
    w.add(TYPEDEF, "u64", ulong[0])

    def pointer(target: int = 0) -> tuple[int, int]:
        return w.pointer(target), 8

    def array(element: tuple[int, int], count: int) -> tuple[int, int]:
        return w.array(element[0], count), element[1] * count

    text, words = array(char, 65), pointer(ulong[0])
    handler = pointer(w.add(FUNC_PROTO, "", 0))
    node_pointer, task_pointer = pointer(), pointer()
    node = _struct(w, "list_head", ("next", node_pointer), ("prev", node_pointer))
    w.point(node_pointer[0], node[0])
    sigset = _struct(w, "", ("sig", array(ulong, 1)))
    sigaction = _struct(
        w, "sigaction", ("sa_handler", handler), ("sa_flags", ulong), ("sa_restorer", handler),
        ("sa_mask", sigset),
    )  # fmt: skip
    k_sigaction = _struct(w, "k_sigaction", ("sa", sigaction))
    sighand = _struct(w, "sighand_struct", ("action", array(k_sigaction, 64)))
    rlimit = _struct(w, "rlimit", ("rlim_cur", ulong), ("rlim_max", ulong))
    signal = _struct(
        w, "signal_struct", ("oom_score_adj", short), ("oom_score_adj_min", short),
        ("rlim", array(rlimit, 16)), ("thread_head", node), ("word", ulong),
        ("is_child_subreaper", u32, 1), ("has_child_subreaper", u32, 1),
    )  # fmt: skip
    _struct(w, "fs_struct", ("umask", integer))
    capability = (
        _struct(w, "kernel_cap_t", ("val", ulong))
        if new
        else _struct(w, "kernel_cap_struct", ("cap", array(u32, 2)))
    )
    counter = _struct(w, "", ("counter", integer))
    user_ns = _struct(w, "user_namespace", ("level", integer))
    cred = _struct(
        w, "cred", ("usage", counter), ("securebits", u32), ("user_ns", pointer(user_ns[0])),
        *((f"cap_{name}", capability)
          for name in ("inheritable", "permitted", "effective", "bset", "ambient")),
    )  # fmt: skip
    bounds = (
        "start_code", "end_code", "start_data", "end_data", "start_stack", "start_brk", "brk",
        "arg_start", "arg_end", "env_start", "env_end",
    )  # fmt: skip
    flags = _struct(w, "mm_flags_t", ("__mm_flags", array(ulong, 1))) if new else ulong
    mm = _struct(
        w, "mm_struct", ("flags", flags), *((name, ulong) for name in bounds),
        ("saved_auxv", array(ulong, 48)),
    )  # fmt: skip
    robust = _struct(w, "robust_list_head", ("list", node))
    exec_state = _struct(w, "task_exec_state", ("count", counter), ("dumpable", u32))
    owned = (("exec_state", pointer(exec_state[0])),) if new else ()
    robust_list = ("robust_list", pointer(robust[0]))
    futex = ("futex", _struct(w, "futex_sched_data", robust_list)) if new else robust_list
    uid = _struct(w, "", ("val", u32))
    task = _struct(
        w, "task_struct", ("pid", integer), ("personality", u32), ("loginuid", uid),
        ("atomic_flags", ulong), ("blocked", sigset), ("sas_ss_sp", ulong),
        ("sas_ss_size", ulong), ("sas_ss_flags", u32), ("pdeath_signal", integer),
        ("comm", array(char, 16)), futex,
        ("clear_child_tid", pointer(integer[0])), ("cred", pointer(cred[0])),
        ("real_cred", pointer(cred[0])), ("real_parent", task_pointer),
        *owned, ("mm", pointer(mm[0])), ("signal", pointer(signal[0])),
        ("sighand", pointer(sighand[0])), ("thread_node", node), ("children", node),
        ("sibling", node),
    )  # fmt: skip
    w.point(task_pointer[0], task[0])
    names = _struct(w, "new_utsname", ("nodename", text), ("domainname", text))
    _struct(w, "uts_namespace", ("name", names))
    _struct(
        w, "ipc_namespace", ("sem_ctls", array(integer, 4)), ("msg_ctlmax", u32),
        ("msg_ctlmnb", u32), ("msg_ctlmni", u32), ("shm_ctlmax", ulong), ("shm_ctlall", ulong),
        ("shm_ctlmni", integer), ("shm_rmid_forced", integer), ("mq_queues_max", u32),
        ("mq_msg_max", u32), ("mq_msgsize_max", u32), ("mq_msg_default", u32),
        ("mq_msgsize_default", u32),
    )  # fmt: skip
    winsize = _struct(
        w, "winsize", ("ws_row", u16), ("ws_col", u16), ("ws_xpixel", u16), ("ws_ypixel", u16)
    )
    _struct(w, "tty_struct", ("winsize", winsize), ("closing", boolean))
    _struct(w, "eventfd_ctx", ("count", ulong))
    _struct(w, "signalfd_ctx", ("sigmask", sigset))
    _struct(w, "timerfd_ctx", ("ticks", ulong))
    operations = _struct(w, "file_operations", ("owner", pointer()))
    file = _struct(
        w, "file", ("f_pos", ulong), ("f_op", pointer(operations[0])), ("private_data", pointer())
    )
    fdtable = _struct(
        w, "fdtable", ("max_fds", u32), ("fd", pointer(pointer(file[0])[0])),
        ("close_on_exec", words),
    )  # fmt: skip
    _struct(w, "files_struct", ("fdt", pointer(fdtable[0])))
    return Types(Btf(w.build()))


class MiniKernel:
    """Memory, and zeroed objects in it."""

    def __init__(self, *, new: bool) -> None:
        self.new = new
        self.types = kernel_types(new=new)
        self.memory = Memory(BASE, 1 << 18)
        self._free = BASE + 64
        self.user_ns = self.make("struct user_namespace")

    def make(self, name: str, count: int = 1) -> Any:
        """Return a new object of that type, or the first of several."""
        address = self._free
        self._free += -(-self.types.sizeof(name) * count // 8) * 8
        return self.types.pointer(name, self.memory, Gva(address))

    def head(self, node: Any) -> None:
        """Make an empty list."""
        node.next = node.prev = node

    def append(self, node: Any, head: Any) -> None:
        """Add a node at the end of a list (``list_add_tail()``)."""
        last = head.prev
        node.next, node.prev = head, last
        last.next = node
        head.prev = node

    def process(self, threads: int = 1, parent: Any = None) -> Any:
        """Return the leader of a new process; the first process is everybody's ancestor."""
        signal, mm = self.make("struct signal_struct"), self.make("struct mm_struct")
        sighand = self.make("struct sighand_struct")
        self.head(signal.thread_head)
        tasks = [self.make("struct task_struct") for _ in range(threads)]
        for number, task in enumerate(tasks):
            task.pid = 100 + number
            task.signal, task.sighand, task.mm = signal, sighand, mm
            if self.new:
                task.exec_state = self.make("struct task_exec_state")
            task.cred = task.real_cred = cred = self.make("struct cred")
            cred.usage.counter, cred.user_ns = 2, self.user_ns
            cred.cap_permitted.cast_("u64")[0] = 0 if parent else CAPABILITIES
            task.real_parent = parent or tasks[0]
            self.head(task.children)
            self.append(task.thread_node, signal.thread_head)
        if parent:
            self.append(tasks[0].sibling, parent.children)
        return tasks[0]

    def files(self, size: int = 128) -> Any:
        """Return a ``files_struct`` with room for descriptors, none of them open."""
        files, fdt = self.make("struct files_struct"), self.make("struct fdtable")
        files.fdt = fdt
        fdt.max_fds = size
        fdt.fd = self.make("struct file *", size)
        fdt.close_on_exec = self.make("unsigned long", size // 64)
        return files
