"""The three kinds of address that this tool must never mix.

All ranges in `ovr` are half-open: ``[start, start + size)``.
"""

from typing import Final, NewType

__all__ = ["PAGE_SHIFT", "PAGE_SIZE", "Gpa", "Gva", "Offset"]

Gva = NewType("Gva", int)
"""Guest virtual address: what a guest task or the guest kernel uses."""

Gpa = NewType("Gpa", int)
"""Guest physical address: what the guest's page tables hold."""

Offset = NewType("Offset", int)
"""Position in a RAM file on the host."""

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
