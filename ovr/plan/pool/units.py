"""Sizes by which the kernel moves memory of the pool."""

from typing import Final

__all__ = ["TABLE_SPAN", "UNIT"]

UNIT: Final = 2 << 20
"""Granularity of memory from the pool, in bytes: a huge page."""
TABLE_SPAN: Final = 1 << 30
"""Range of a page table of 2 MiB entries, in bytes: the kernel moves such a table at once if source
and destination are aligned to it (``move_normal_pud`` of mm/mremap.c)."""
