"""The kernel view: a guest's Linux kernel, read and written from outside through its RAM alone.

::

    kernel = Kernel.find(ram)
    task = find_task(kernel, 4242)
    task.fs.umask = 0o137

`kernel` finds it from three sources in RAM: `vmcoreinfo`, `kallsyms` and `btf` (`vmlinux` replaces
the latter two). `cache` stores the parsed tables. `view`, `codec` and `types` present guest memory
as C objects; `linux` has the kernel's own containers and objects, under the kernel's names.
"""

from ovr.kernel.kernel import Kernel
from ovr.kernel.linux.creds import capabilities, in_own_user_ns, why_not_root
from ovr.kernel.linux.list import list_for_each_entry
from ovr.kernel.linux.mm import (
    VM_HUGETLB,
    VM_IO,
    VM_PFNMAP,
    VM_SOFTDIRTY,
    Vma,
    anon_vma_users,
    find_vma,
    for_each_vma,
    mm_space,
    vmas,
)
from ovr.kernel.linux.pid import (
    find_pid_ns,
    find_task_by_pid_ns,
    pid_nr_ns,
    task_active_pid_ns,
)
from ovr.kernel.linux.rbtree import rbtree_for_each_entry
from ovr.kernel.linux.tasks import (
    Process,
    find_task,
    for_each_process,
    for_each_thread,
    is_kernel_thread,
    is_traced,
    processes,
    task_comm,
    task_state,
    tree_of,
)
from ovr.kernel.linux.xarray import idr_find, xa_load
from ovr.kernel.types.live import settled, types_that_fit
from ovr.kernel.types.types import NoSuchType, Types
from ovr.kernel.types.view import (
    Array,
    DoesNotFit,
    NoSuchMember,
    OutOfBounds,
    Pointer,
    Struct,
    address_of,
    container_of,
)

__all__ = [
    "VM_HUGETLB",
    "VM_IO",
    "VM_PFNMAP",
    "VM_SOFTDIRTY",
    "Array",
    "DoesNotFit",
    "Kernel",
    "NoSuchMember",
    "NoSuchType",
    "OutOfBounds",
    "Pointer",
    "Process",
    "Struct",
    "Types",
    "Vma",
    "address_of",
    "anon_vma_users",
    "capabilities",
    "container_of",
    "find_pid_ns",
    "find_task",
    "find_task_by_pid_ns",
    "find_vma",
    "for_each_process",
    "for_each_thread",
    "for_each_vma",
    "idr_find",
    "in_own_user_ns",
    "is_kernel_thread",
    "is_traced",
    "list_for_each_entry",
    "mm_space",
    "pid_nr_ns",
    "processes",
    "rbtree_for_each_entry",
    "settled",
    "task_active_pid_ns",
    "task_comm",
    "task_state",
    "tree_of",
    "types_that_fit",
    "vmas",
    "why_not_root",
    "xa_load",
]
