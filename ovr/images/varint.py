"""Decode protobuf's variable-length integers at many positions of a buffer at once."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["BadVarint", "read_varints"]


class BadVarint(ValueError):
    """An integer longer than ten bytes, or cut off."""


def read_varints(
    raw: NDArray[np.uint8], at: NDArray[np.int64], stop: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Decode one integer at each position.

    Args:
        raw: the buffer.
        at: the position of each integer.
        stop: the end of the bytes that each integer may use.

    Returns:
        The values, cut to 64 bits as protobuf does, and the positions after them.

    Raises:
        BadVarint: an integer has more than ten bytes or does not end before its `stop`.
    """
    at = at.copy()
    values = np.zeros(len(at), np.uint64)
    live: NDArray[np.int64] | slice = slice(None)  # the first round takes all, without an index
    for shift in range(0, 70, 7):
        here = at[live]
        if (here >= stop[live]).any():
            raise BadVarint
        byte = raw[here]
        values[live] |= (byte & 0x7F).astype(np.uint64) << np.uint64(shift)
        at[live] = here + 1
        more = byte >= 0x80
        if not more.any():
            return values, at
        live = np.flatnonzero(more) if isinstance(live, slice) else live[more]
    raise BadVarint
