"""The options that say which VM is meant, and what helps to understand its kernel."""

import argparse
from pathlib import Path

__all__ = ["add_vm_options"]


def add_vm_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--vm`` and ``--vmlinux``; without `required` the first is only checked, if given."""
    also = None if required else "also check that this VM can be reached"
    parser.add_argument("--vm", required=required, metavar="VM", help=also)
    parser.add_argument(
        "--vmlinux", metavar="FILE", type=Path,
        help="the guest's kernel with symbol table or .BTF, if the guest keeps none in its memory",
    )  # fmt: skip
