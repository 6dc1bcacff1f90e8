"""Save processes of a running QEMU VM, and restore them into one, from outside the VM."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovr.api import Vm, attach
    from ovr.dump.report import DumpReport
    from ovr.errors import OvrError
    from ovr.restore.report import Report

__all__ = ["DumpReport", "OvrError", "Report", "Vm", "attach"]

_ROOMS = {
    "DumpReport": "dump.report", "OvrError": "errors", "Report": "restore.report", "Vm": "api",
    "attach": "api",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Loaded when they are asked for: `ovr --help` needs no numpy, and the command line sets up its
    # process before anything large is loaded.
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"ovr.{_ROOMS[name]}"), name)
    globals()[name] = found
    return found
