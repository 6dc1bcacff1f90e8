"""Sizes of memory as people write them."""

import re
from typing import Final

from ovr.errors import UsageError

__all__ = ["parse_size"]

_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str, grain: int) -> int:
    """Return the number of bytes in ``4G``, ``1536M`` or a plain number.

    Args:
        text: the size; units are powers of 1024.
        grain: the size must be a multiple of this, in bytes.

    Raises:
        UsageError: not a size, zero, or no multiple of `grain`.
    """
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size of memory", "write 4G or 1536M")
    size = int(match[1]) << _UNITS[match[2].upper()]
    if size == 0 or size % grain:
        unit = f"{grain >> 20}M" if grain >= 1 << 20 else f"{grain >> 10}K"
        raise UsageError(f"{text} of memory is not a multiple of {unit}", "write 4G or 1536M")
    return size
