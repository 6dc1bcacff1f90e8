"""Write the limits of an IPC namespace."""

from typing import Any, Final

from ovr.images.objects import IpcVarEntry
from ovr.state.kind import Kind
from ovr.state.scope import IPC

__all__ = ["KINDS", "IpcLimits"]

_HUGE: Final = (1 << 64) - 1 - (1 << 24)  # SHMMAX, SHMALL
_DEFAULTS: Final = {
    "msg_ctlmax": 8192,
    "msg_ctlmnb": 16384,
    "msg_ctlmni": 32000,
    "shm_ctlmax": _HUGE,
    "shm_ctlall": _HUGE,
    "shm_ctlmni": 4096,
    "shm_rmid_forced": 0,
    "mq_queues_max": 256,
    "mq_msg_max": 10,
    "mq_msgsize_max": 8192,
    "mq_msg_default": 10,
    "mq_msgsize_default": 8192,
}
_SEM_DEFAULTS: Final = (32000, 1024000000, 500, 32000)


class IpcLimits(Kind):
    """The sysctls of SysV IPC and POSIX message queues."""

    name = "ipc_limits"
    groups = ("container",)
    summary = "sysctls of an IPC namespace without SysV objects (ipc_namespace.sem_ctls …)"
    source = "prepare_ipc_var() in criu/ipc_ns.c; ipc/ipc_sysctl.c, ipc/mq_sysctl.c"
    scope = IPC

    def take(self, image: IpcVarEntry) -> dict[str, Any] | None:
        """Return the values by the kernel's names; None if an old CRIU did not dump all."""
        if not all(image.HasField(name) for name in _DEFAULTS):
            return None
        values: dict[str, Any] = {name: getattr(image, name) for name in _DEFAULTS}
        return {"sem_ctls": tuple(image.sem_ctls), **values}

    def neutralise(self, image: IpcVarEntry) -> None:
        """Set the kernel's defaults."""
        image.sem_ctls[:] = _SEM_DEFAULTS
        for name, default in _DEFAULTS.items():
            setattr(image, name, default)

    def write(self, target: Any, value: dict[str, Any]) -> None:
        """Store as the sysctl handlers do in an empty namespace."""
        # SAFETY: the namespace is not the VM's own but was made by CRIU for this tree, whose tasks
        # are stopped. The handlers store words; their other effects (removing orphaned segments,
        # checking that semaphore arrays fit) concern objects, and the scope leaves a namespace
        # with objects inside. Undone by killing the tree, which ends the namespace.
        for name, number in value.items():
            setattr(target, name, number)

    def read(self, target: Any) -> dict[str, Any]:
        limits: dict[str, Any] = {name: getattr(target, name) for name in _DEFAULTS}
        return {"sem_ctls": tuple(target.sem_ctls), **limits}


KINDS: Final = (IpcLimits(),)
