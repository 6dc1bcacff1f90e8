"""Options that select a VM, its kernel file and its agent."""

import argparse
import os
from pathlib import Path

__all__ = ["add_agent_option", "add_vm_options"]


def add_vm_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--vm`` and ``--vmlinux``."""
    named = os.environ.get("OVR_VM")
    parser.add_argument(
        "--vm", required=not named, default=named, metavar="VM",
        help="the VM, see below (default: OVR_VM in the environment)",
    )  # fmt: skip
    parser.add_argument(
        "--vmlinux", metavar="FILE", type=Path,
        help="the guest's kernel with symbol table or .BTF, if they are not in the guest's memory",
    )  # fmt: skip


def add_agent_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--agent``."""
    parser.add_argument(
        "--agent", metavar="ADDR", default=os.environ.get("OVR_AGENT") or None,
        help="address of the guest's agent (default: OVR_AGENT, or found from the VM's devices)",
    )  # fmt: skip
