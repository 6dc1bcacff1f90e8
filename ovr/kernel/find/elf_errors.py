"""What pyelftools raises for a file that is damaged: more than it says."""

import struct
import zlib

__all__ = ["elf_errors"]


def elf_errors() -> tuple[type[Exception], ...]:
    """Return the errors that reading a damaged ELF file or its DWARF may end in."""
    # not at the top of the module: it takes longer to import than an attach
    from elftools.common.exceptions import DWARFError, ELFError  # noqa: PLC0415
    from elftools.construct import ConstructError  # noqa: PLC0415

    return (
        *(ELFError, DWARFError, ConstructError, struct.error, zlib.error),
        *(ValueError, LookupError, TypeError, AttributeError, AssertionError),
        *(ArithmeticError, NotImplementedError, EOFError, RecursionError),
    )
