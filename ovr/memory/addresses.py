"""Types for the three kinds of address, which must never be mixed.

All ranges in `ovr` are half-open: ``[start, start + size)``.
"""

from typing import Final, NewType

__all__ = ["PAGE_SHIFT", "PAGE_SIZE", "Gpa", "Gva", "Offset"]

Gva = NewType("Gva", int)
"""Guest virtual address, as used by a guest task or the guest kernel."""

Gpa = NewType("Gpa", int)
"""Guest physical address, as in the guest's page tables."""

Offset = NewType("Offset", int)
"""Position in a RAM file on the host."""

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
