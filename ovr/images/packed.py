"""Recognise packed files, so that they are not reported as damaged images."""

from typing import Final

from ovr.errors import ImagesUnsupported

__all__ = ["HEAD_SIZE", "packing", "refuse_packed"]

HEAD_SIZE: Final = 512
"""Bytes from the start of a file that `packing` needs."""

# Offset, magic (RFC 8878, RFC 1952, the LZ4 frame and xz file formats), name, unpacking command.
_PACKINGS: Final = (
    (0, b"\x28\xb5\x2f\xfd", "zstd", "zstd -d"),
    (0, b"\x1f\x8b", "gzip", "gzip -d"),
    (0, b"\x04\x22\x4d\x18", "lz4", "lz4 -d"),
    (0, b"\xfd7zXZ\x00", "xz", "xz -d"),
    (0, b"BZh", "bzip2", "bzip2 -d"),
    (257, b"ustar", "tar", "tar -xf"),
)


def packing(head: bytes) -> tuple[str, str] | None:
    """Return the packing format of a file and the command that unpacks it; None if not packed."""
    for at, magic, name, command in _PACKINGS:
        if head[at : at + len(magic)] == magic:
            return name, command
    return None


def refuse_packed(head: bytes, name: str) -> None:
    """Raise if the file `name`, which begins with `head`, is packed.

    Raises:
        ImagesUnsupported: it is packed; the message names the format.
    """
    if found := packing(head):
        raise ImagesUnsupported(
            f"{name}: packed with {found[0]}", f"unpack it first: {found[1]} {name}"
        )
