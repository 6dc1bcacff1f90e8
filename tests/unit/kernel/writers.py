"""BTF, kallsyms and VMCOREINFO made by hand, and memory to put them in.

Written from the formats' descriptions, not from the readers that they test.
"""

import struct
from dataclasses import dataclass, field

from ovr.errors import GuestFault
from ovr.memory.addresses import Gva

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST = range(1, 11)
RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(11, 20)


class Memory:
    """A piece of guest virtual memory; remembers what was written to it."""

    def __init__(self, base: int = 0xFFFF_8880_0000_0000, size: int = 1 << 16) -> None:
        self.base = base
        self.data = bytearray(size)
        self.writes: list[tuple[int, bytes]] = []
        self.recorder = None

    def _at(self, gva: int, size: int) -> slice:
        if not self.base <= gva <= gva + size <= self.base + len(self.data):
            raise GuestFault(f"guest virtual address {gva:#x} is not mapped", gva)
        return slice(gva - self.base, gva - self.base + size)

    def read(self, gva: Gva, size: int) -> bytes:
        return bytes(self.data[self._at(gva, size)])

    def write(self, gva: Gva, data: bytes) -> None:
        self.data[self._at(gva, len(data))] = data
        self.writes.append((gva, data))

    def poke(self, gva: int, form: str, *values: int | bytes) -> None:
        """Put values into memory as the guest itself would: not a write of ours."""
        struct.pack_into("<" + form, self.data, gva - self.base, *values)

    def peek(self, gva: int, form: str) -> int:
        return struct.unpack_from("<" + form, self.data, gva - self.base)[0]


class BtfWriter:
    """Types in, section .BTF out; every method returns the id of the type it adds."""

    def __init__(self) -> None:
        self.types: list[bytearray] = []
        self.strings = bytearray(b"\0")
        self._offsets = {"": 0}

    def name(self, text: str) -> int:
        if text not in self._offsets:
            self._offsets[text] = len(self.strings)
            self.strings += text.encode() + b"\0"
        return self._offsets[text]

    def add(self, kind: int, name: str, size: int, rest: bytes = b"", *, vlen: int = 0, flag=False):
        info = flag << 31 | kind << 24 | vlen
        self.types.append(bytearray(struct.pack("<III", self.name(name), info, size) + rest))
        return len(self.types)

    def integer(self, name: str, size: int, *, signed=False, boolean=False, bits=None) -> int:
        encoding = (signed | boolean << 2) << 24 | (8 * size if bits is None else bits)
        return self.add(INT, name, size, struct.pack("<I", encoding))

    def pointer(self, target: int = 0) -> int:
        return self.add(PTR, "", target)

    def point(self, pointer: int, target: int) -> None:
        """Let a pointer that was added before its target point to it."""
        struct.pack_into("<I", self.types[pointer - 1], 8, target)

    def array(self, element: int, count: int) -> int:
        return self.add(ARRAY, "", 0, struct.pack("<III", element, 1, count))

    def struct(self, name: str, size: int, *members, kind: int = STRUCT) -> int:
        """Members are (name, type, offset in bytes) or (name, type, bit offset, bits)."""
        rest = b""
        flag = any(len(member) == 4 for member in members)
        for text, type_id, *where in members:
            offset = where[0] | where[1] << 24 if len(where) == 2 else 8 * where[0]
            rest += struct.pack("<III", self.name(text), type_id, offset)
        return self.add(kind, name, size, rest, vlen=len(members), flag=flag)

    def union(self, name: str, size: int, *members) -> int:
        return self.struct(name, size, *members, kind=UNION)

    def enum(self, name: str, size: int = 4, *, signed=False, wide=False, **values: int) -> int:
        form = ("<Iq" if signed else "<IQ") if wide else ("<Ii" if signed else "<II")
        rest = b"".join(struct.pack(form, self.name(text), value) for text, value in values.items())
        return self.add(ENUM64 if wide else ENUM, name, size, rest, vlen=len(values), flag=signed)

    def build(self, *, layout: bytes | None = None) -> bytes:
        types = b"".join(self.types)
        header_size = 24 if layout is None else 32
        header = struct.pack(
            "<HBBIIIII", 0xEB9F, 1, 0, header_size, 0, len(types), len(types), len(self.strings)
        )
        if layout is None:
            return header + types + self.strings
        tail = types + bytes(self.strings)
        tail += bytes(-len(tail) % 4)
        return header + struct.pack("<II", len(tail), len(layout)) + tail + layout


ENCODINGS = ("absolute", "absolute percpu", "base relative", "place relative")


@dataclass
class KallsymsWriter:
    """A symbol table as scripts/kallsyms.c lays it out; per-cpu symbols lie below 1 MiB."""

    symbols: list[tuple[str, int]]
    encoding: str = "absolute percpu"
    types: str = "T"
    tokens: list[bytes] = field(default_factory=list)

    def build(self, base: int) -> tuple[bytes, dict[str, int]]:
        """Return the table as it lies at `base`, and the SYMBOL lines of VMCOREINFO for it."""
        self.tokens = self._tokens()
        parts: dict[str, bytes] = {"num_syms": struct.pack("<Q", len(self.symbols))}
        parts["names"] = b"".join(self._name(self.types + name) for name, _ in self.symbols)
        parts["markers"] = bytes(4 * (len(self.symbols) // 256 + 1))
        parts["token_table"] = b"".join(token + b"\0" for token in self.tokens)
        starts = [sum(len(t) + 1 for t in self.tokens[:n]) for n in range(256)]
        parts["token_index"] = struct.pack("<256H", *starts)
        data, where = b"", {}
        for name, part in parts.items():
            where[f"kallsyms_{name}"] = base + len(data)
            data += part + bytes(-len(part) % 8)
        del where["kallsyms_markers"]
        return self._addresses(data, where, base)

    def _addresses(self, data: bytes, where: dict[str, int], base: int):
        at = base + len(data)
        values = [address for _, address in self.symbols]
        low = min(value for value in values if value >= 1 << 20)
        if self.encoding == "absolute":
            where["kallsyms_addresses"] = at
            return data + struct.pack(f"<{len(values)}Q", *values), where
        where["kallsyms_offsets"] = at
        if self.encoding == "place relative":
            offsets = [value - (at + 4 * n) for n, value in enumerate(values)]
            return data + struct.pack(f"<{len(values)}i", *offsets), where
        if self.encoding == "base relative":
            data += struct.pack(f"<{len(values)}I", *(value - low for value in values))
        else:
            offsets = [v if v < 1 << 20 else low - 1 - v for v in values]
            data += struct.pack(f"<{len(values)}i", *offsets)
        data += bytes(-len(data) % 8)
        where["kallsyms_relative_base"] = base + len(data)
        return data + struct.pack("<Q", low), where

    def _tokens(self) -> list[bytes]:
        # Every byte that occurs stands for itself; the free codes get common strings.
        text = (self.types + "".join(name for name, _ in self.symbols)).encode()
        tokens = [bytes([code]) if code in text else b"" for code in range(256)]
        common = [b"init_", b"_task", b"sta", b"rt", b"__", b"long_name"]
        free = [code for code in range(255, -1, -1) if not tokens[code]]
        for code, token in zip(free, common, strict=False):
            tokens[code] = token
        return tokens

    def _name(self, name: str) -> bytes:
        codes = bytearray()
        rest = name.encode()
        while rest:
            token = max((t for t in self.tokens if t and rest.startswith(t)), key=len)
            codes.append(self.tokens.index(token))
            rest = rest[len(token) :]
        size = len(codes)
        length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
        return length + codes


def vmcoreinfo_text(symbols: dict[str, int], **changes: str | None) -> bytes:
    """A VMCOREINFO text; `changes` replace the line of a key, None leaves it out."""
    lines = {
        "OSRELEASE": "OSRELEASE=6.12.0-toy",
        "BUILD_ID": "BUILD-ID=0123456789abcdef0123456789abcdef01234567",
        "PAGESIZE": "PAGESIZE=4096",
        "uts_name": "OFFSET(uts_namespace.name)=0",
        "vmalloc": "NUMBER(VMALLOC_START)=0xff3e7f33c0000000",
        "length": "LENGTH(zone.free_area)=11",
        "phys_base": "NUMBER(phys_base)=0",
        "l5": "NUMBER(pgtable_l5_enabled)=0",
        "offset": "KERNELOFFSET=2ae00000",
        "image_size": "NUMBER(KERNEL_IMAGE_SIZE)=1073741824",
        "sme": "NUMBER(sme_mask)=0",
    }
    lines |= {name: f"SYMBOL({name})={address:x}" for name, address in symbols.items()}
    for key, line in changes.items():
        if line is None:
            del lines[key]
        else:
            lines[key] = line
    return "".join(line + "\n" for line in lines.values()).encode()


def elf(
    sections: dict[str, tuple[int, bytes]],
    symbols: list[tuple[str, int]],
    build_id: tuple[int, bytes] | None,
) -> bytes:
    """A minimal ELF file as the kernel's linker leaves it, symbols at link-time addresses.

    Args:
        sections: (address, content) by name.
        symbols: functions in the first section.
        build_id: where the kernel has its id, and the id.
    """
    strings = BtfWriter()  # for its string table
    table = bytes(24) + struct.pack("<IBBHQQ", strings.name("file.c"), 4, 0, 0xFFF1, 0, 0)
    for name, value in symbols:
        table += struct.pack("<IBBHQQ", strings.name(name), 0x12, 0, 1, value, 0)
    parts = [(name, 1, at, content, 0, 0) for name, (at, content) in sections.items()]
    if build_id:
        note = struct.pack("<III4s", 4, len(build_id[1]), 3, b"GNU") + build_id[1]
        other = struct.pack("<III8s4s", 6, 4, 7, b"Linux", b"\1\2\3\4")
        parts.append((".notes", 7, build_id[0] - 16 - len(other), other + note, 0, 0))
    if symbols:
        parts.append((".symtab", 2, 0, table, len(parts) + 2, 24))
        parts.append((".strtab", 3, 0, bytes(strings.strings), 0, 0))
    names = BtfWriter()
    offsets = [names.name(part[0]) for part in (*parts, (".shstrtab",))]
    parts.append((".shstrtab", 3, 0, bytes(names.strings), 0, 0))
    body, headers = b"", bytes(64)
    for (_, kind, at, content, link, entry), offset in zip(parts, offsets, strict=True):
        headers += struct.pack(
            "<IIQQQQIIQQ", offset, kind, 0, at, 64 + len(body), len(content), link, 0, 8, entry
        )
        body += content + bytes(-len(content) % 8)
    ident = b"\x7fELF\2\1\1".ljust(16, b"\0")
    count = len(parts) + 1
    where = 64 + len(body)
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 0, where, 0, 64, 0, 0, 64, count, count - 1)
    return ident + header + body + headers
