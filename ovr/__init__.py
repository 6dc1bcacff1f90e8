"""Restore checkpointed processes and containers into a running QEMU VM, from outside the VM."""

from ovr.api import Vm, attach
from ovr.errors import OvrError
from ovr.report import Report

__all__ = ["OvrError", "Report", "Vm", "attach"]
