"""Tars made header by header, sound but for what a test wants otherwise."""

import tarfile

END = bytes(2 * tarfile.BLOCKSIZE)
CONFIG = b'{"id": "a", "name": "n", "spec": {}}'


def sealed(header: bytes) -> bytes:
    """A header with the right checksum."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % (sum(blank) & 0o777777) + blank[156:]


def head(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, field: bytes = b"") -> bytes:
    """A header; `field` is what the 12 bytes of its size are, if not octal digits."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, 0 if field else size
    block = info.tobuf(tarfile.GNU_FORMAT)
    return sealed(block[:124] + field.rjust(12, b"\0")[:12] + block[136:]) if field else block


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header and its content."""
    return head(name, len(data), kind) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def base256(number: int) -> bytes:
    """A number as GNU tar writes those that have no room as octal digits."""
    sign = 0xFF if number < 0 else 0x80
    return bytes([sign]) + (number & (1 << 88) - 1).to_bytes(11, "big")


def record(key: str, value: str) -> bytes:
    """A record of a pax header."""
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


def pax(*records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extension header with records."""
    return member("pax", b"".join(records), kind)


def long_name(name: str, kind: bytes = tarfile.GNUTYPE_LONGNAME) -> bytes:
    """GNU tar's extension header for a long name."""
    return member("././@LongLink", name.encode() + b"\0", kind)


def container(*more: bytes) -> bytes:
    """The members of a container's archive that must be there, without an end."""
    files = (("checkpoint/inventory.img", b"x" * 8), ("config.dump", CONFIG), ("spec.dump", b"{}"))
    return b"".join(more) + b"".join(member(name, data) for name, data in files)
