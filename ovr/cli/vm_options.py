"""The options that say which VM is meant, and what helps to understand its kernel."""

import argparse
import os
from pathlib import Path

__all__ = ["add_agent_option", "add_vm_options"]


def add_vm_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--vm`` and ``--vmlinux``."""
    named = os.environ.get("OVR_VM")
    parser.add_argument(
        "--vm", required=not named, default=named, metavar="VM",
        help="which VM: see below (default: what OVR_VM in the environment says)",
    )  # fmt: skip
    parser.add_argument(
        "--vmlinux", metavar="FILE", type=Path,
        help="the guest's kernel with symbol table or .BTF, if the guest keeps none in its memory",
    )  # fmt: skip


def add_agent_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--agent``."""
    parser.add_argument(
        "--agent", metavar="ADDR", default=os.environ.get("OVR_AGENT") or None,
        help="where the guest's agent listens (default: OVR_AGENT, or what the VM's devices say)",
    )  # fmt: skip
