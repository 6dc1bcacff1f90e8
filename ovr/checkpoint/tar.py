"""Read the members of an untrusted tar, with limits on sizes, counts, name lengths and nesting.

All tars, packed or not, are read by `read_members`. It takes one header after the other from a
`TarSource`, for a packed archive the output of its unpacker, so that a size is checked before the
bytes that it announces are read. Python's tarfile is used only to decode single headers: its reader
recurses for each extension header, accepts negative sizes, and stops silently at a damaged header.

Formats: POSIX.1-2001 (pax), and GNU's long names and base-256 numbers.
"""

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.images.framing import DUMP_AGAIN

__all__ = ["BLOCK", "Member", "TarSource", "padded", "read_members"]

BLOCK: Final = tarfile.BLOCKSIZE
"""Size of a header in bytes; content is padded to a multiple of it."""

_MAX_MEMBERS: Final = 1 << 16  # as many images as the agent takes
_MAX_EXTENSION: Final = 1 << 20  # bytes of one extension header; as in Go's archive/tar
_MAX_EXTENSIONS: Final = 64 << 20  # bytes of all of them
_MAX_NAME: Final = 4096  # PATH_MAX

# Each may occur once before a member's own header: two could contradict each other.
_PAX: Final = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LINKS: Final = (tarfile.SYMTYPE, tarfile.LNKTYPE)
_EXTENSIONS: Final = {
    tarfile.XHDTYPE: "pax", tarfile.SOLARIS_XHDTYPE: "pax", tarfile.XGLTYPE: "global pax",
    tarfile.GNUTYPE_LONGNAME: "long name", tarfile.GNUTYPE_LONGLINK: "long link",
}  # fmt: skip
_RECORDS: Final = (b"path", b"linkpath", b"size")
_RECORD: Final = re.compile(rb"(\d{1,7}) ([^=]{1,4096})=")


class Member(NamedTuple):
    """A member of a tar. Sizes and positions in bytes of the unpacked archive.

    Attributes:
        name: without a leading ``./``.
        kind: the type flag of its header.
        size: size of its content.
        offset: position of its headers, extensions first.
        offset_data: position of its content.
        link: the target of a symbolic or hard link, as archived; else empty.
    """

    name: str
    kind: bytes
    size: int
    offset: int
    offset_data: int
    link: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return self.kind in tarfile.REGULAR_TYPES

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.kind == tarfile.DIRTYPE

    @property
    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return self.kind == tarfile.SYMTYPE

    @property
    def end(self) -> int:
        """Position of the next member's headers."""
        return self.offset_data + padded(self.size)


class TarSource(Protocol):
    """A tar as a stream."""

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end of the file."""

    def skip(self, size: int) -> int:
        """Skip the next `size` bytes; return how many of them exist."""


def padded(size: int) -> int:
    """Return `size` rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def read_members(source: TarSource, path: Path) -> dict[str, Member]:
    """Return the members of a tar by name, in archive order.

    Args:
        source: at the tar's beginning; left after the first of the blocks that end it.
        path: its name in messages.

    Raises:
        ImagesDamaged: it is truncated, contradicts itself, or exceeds a limit.
        ImagesUnsupported: it has sparse files.
    """
    reader = _Reader(source, path)
    members: dict[str, Member] = {}
    while (member := reader.next()) is not None:
        if member.name in members:
            raise reader.damaged(f"{member.name} occurs twice")
        if len(members) == _MAX_MEMBERS:
            raise reader.damaged(f"more than {_MAX_MEMBERS} members")
        members[member.name] = member
    return members


@dataclass
class _Extensions:
    # Contents of the extension headers of one member.
    seen: set[str] = field(default_factory=set)
    name: str | None = None
    link: str | None = None
    size: int | None = None


class _Reader:
    def __init__(self, source: TarSource, path: Path) -> None:
        self._source = source
        self._path = path
        self._at = 0
        self._extensions_left = _MAX_EXTENSIONS

    def damaged(self, what: str) -> ImagesDamaged:
        return ImagesDamaged(f"{self._path}: {what}", DUMP_AGAIN)

    def next(self) -> Member | None:
        offset, found = self._at, _Extensions()
        while (header := self._header()) is not None:
            kind = _EXTENSIONS.get(header.type)
            if kind is None:
                return self._member(header, offset, found)
            if kind in found.seen:
                raise self.damaged(f"two {kind} headers for one member at byte {offset}")
            found.seen.add(kind)
            self._extend(found, header)
        if found.seen:
            raise self.damaged(f"an extension header without a member at byte {offset}")
        return None

    def _header(self) -> tarfile.TarInfo | None:
        # Returns None at the block of zeros that ends the archive.
        block = self._source.read(BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if len(block) < BLOCK:
                raise self.damaged(f"cut off at byte {self._at + len(block)}") from error
            if not any(block):
                return None
            raise self.damaged(f"no header at byte {self._at}: {error}") from error
        if header.size < 0:
            raise self.damaged(f"a size of {header.size} bytes at byte {self._at}")
        self._at += BLOCK
        return header

    def _extend(self, found: _Extensions, header: tarfile.TarInfo) -> None:
        if header.size > min(_MAX_EXTENSION, self._extensions_left):
            raise self.damaged(
                f"an extension header of {header.size} bytes at byte {self._at - BLOCK}"
            )
        self._extensions_left -= header.size
        data = self._source.read(padded(header.size))
        if len(data) < padded(header.size):
            raise self.damaged(f"cut off at byte {self._at + len(data)}")
        self._at += len(data)
        data = data[: header.size]
        if header.type == tarfile.GNUTYPE_LONGNAME:
            self._rename(found, data.partition(b"\0")[0])
        elif header.type == tarfile.GNUTYPE_LONGLINK:
            self._link(found, data.partition(b"\0")[0])
        elif header.type in _PAX:
            self._apply(found, self._records(data))
        elif header.type == tarfile.XGLTYPE and self._records(data):
            raise self.damaged("a global header gives all members one name, link or size")

    def _records(self, data: bytes) -> dict[bytes, bytes]:
        # The pax records "LENGTH KEY=VALUE\n" that change a member's name, link or size.
        found: dict[bytes, bytes] = {}
        at = 0
        while at < len(data):
            match = _RECORD.match(data, at)
            end = at + int(match[1]) if match else 0
            if match is None or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
                if not any(data[at:]):
                    break  # some writers pad with zeros
                raise self.damaged("a damaged pax header")
            if match[2].startswith(b"GNU.sparse."):
                raise self._sparse(data[match.end() : end - 1])
            if match[2] in _RECORDS:
                if match[2] in found:
                    raise self.damaged(f"two values of {match[2].decode()} in one pax header")
                found[match[2]] = data[match.end() : end - 1]
            at = end
        return found

    def _apply(self, found: _Extensions, records: dict[bytes, bytes]) -> None:
        if (name := records.get(b"path")) is not None:
            self._rename(found, name)
        if (link := records.get(b"linkpath")) is not None:
            self._link(found, link)
        if (size := records.get(b"size")) is not None:
            if not re.fullmatch(rb"\d{1,18}", size):
                raise self.damaged(f"a size of {size[:40].decode(errors='replace')} bytes")
            found.size = int(size)

    def _rename(self, found: _Extensions, name: bytes) -> None:
        if found.name is not None:
            raise self.damaged("two long names for one member")
        found.name = name.decode("utf-8", "surrogateescape").rstrip("/")

    def _link(self, found: _Extensions, target: bytes) -> None:
        if found.link is not None:
            raise self.damaged("two link targets for one member")
        found.link = target.decode("utf-8", "surrogateescape")

    def _member(self, header: tarfile.TarInfo, offset: int, found: _Extensions) -> Member:
        name = self._plain(header.name if found.name is None else found.name)
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise self._sparse(name.encode("utf-8", "surrogateescape"))
        size = header.size if found.size is None else found.size
        if header.type in tarfile.SUPPORTED_TYPES and not header.isreg():
            size = 0  # links and special files have no content, whatever size their header has
        link = header.linkname if found.link is None else found.link
        if header.type not in _LINKS:
            link = ""
        member = Member(name, header.type, size, offset, self._at, link)
        there = self._source.skip(padded(size))
        if there < padded(size):
            raise self.damaged(f"cut off in {name}")
        self._at = member.end
        return member

    def _plain(self, name: str) -> str:
        plain = name.removeprefix("./") or "."
        parts = plain.split("/")
        if len(plain) > _MAX_NAME or "\0" in plain:
            raise self.damaged(f"a name of {len(plain)} characters: {plain[:40]}…")
        if plain != "." and any(part in ("", ".", "..") for part in parts):
            raise self.damaged(f"{plain} is not a name below the archive's root")
        return plain

    def _sparse(self, name: bytes) -> ImagesUnsupported:
        return ImagesUnsupported(
            f"{self._path}: {name[:200].decode(errors='replace')} is stored as a sparse file",
            "unpack the archive, and pack it again without --sparse",
        )
