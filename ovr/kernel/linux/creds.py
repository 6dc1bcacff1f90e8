"""Credentials: the rights of a task in the whole guest, independent of its own namespaces.

Source: include/linux/cred.h, kernel/cred.c; credentials(7), user_namespaces(7).
"""

from typing import Any, Final

from ovr.kernel.kernel import Kernel
from ovr.kernel.linux.pid import task_active_pid_ns
from ovr.kernel.types.view import Struct

__all__ = ["capabilities", "in_own_user_ns", "why_not_root"]

_IDS: Final = ("uid", "euid", "suid", "fsuid")


def capabilities(cred: Struct, name: str) -> Any:
    """Return a capability set of a ``struct cred`` as a pointer to one word.

    Args:
        cred: the credentials.
        name: ``inheritable``, ``permitted``, ``effective``, ``bset`` or ``ambient``.
    """
    # Linux kernel commit f122a08b197d ("capability: just use a 'single u64' instead of a
    # 'u32[2]' array") (in v6.3): on a little-endian machine the same eight bytes.
    return getattr(cred, f"cap_{name}").cast_("u64")


def in_own_user_ns(task: Struct) -> bool:
    """Tell whether a task is in another user namespace than the initial one.

    Whatever its capabilities there, ``capable()`` is false for it.
    """
    return bool(task.real_cred.user_ns.level)


def why_not_root(kernel: Kernel, task: Struct) -> str:
    """Return why a task is not root of the whole guest; empty if it is.

    Root of the whole guest has user id 0 and the capabilities of the guest's init, in the initial
    user and pid namespaces. The answer holds as long as the VM is held.

    Args:
        kernel: the guest's kernel.
        task: a task of any of its processes.
    """
    # Not `cred`: the kernel may override it for a moment (override_creds(); overlayfs uses those of
    # the task that mounted it).
    cred, init_ns = task.real_cred, kernel["init_pid_ns"]
    # The idle task's credentials are init_cred, whose namespace is init_user_ns.
    if cred.user_ns != kernel["init_task"].real_cred.user_ns:
        return "it is in a user namespace of its own"
    ids = [int(getattr(cred, name).val) for name in _IDS]
    if any(ids):
        return f"it runs as user {max(ids)}"
    if task_active_pid_ns(task) != init_ns:
        return "it is in a pid namespace of its own"
    init = capabilities(init_ns.child_reaper.real_cred, "effective")[0]
    lacking = init & ~capabilities(cred, "effective")[0]
    if lacking:
        return f"it lacks capabilities {lacking:#x}, which the guest's init has"
    return ""
