"""drgn as a second reader of a guest, with nothing of `ovr.kernel` but where VMCOREINFO is.

Its kallsyms, its page walk, its member access; and since drgn reads no BTF, a BTF reader of this
file's own, written from the format's description.
"""

import mmap
import struct

import drgn
from drgn import Object, TypeEnumerator, TypeKind, TypeMember
from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms

KIND = {
    TypeKind.INT: (1,),
    TypeKind.BOOL: (1,),
    TypeKind.STRUCT: (4,),
    TypeKind.UNION: (5,),
    TypeKind.ENUM: (6, 19),
    TypeKind.TYPEDEF: (8,),
}
EXTRA = {1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0)}
EXTRA |= {15: (0, 12), 17: (4, 0), 19: (0, 12)}
PLAIN = {7: "forward", 9: "volatile", 10: "const", 11: "restrict", 18: "tag"}


class DrgnTypes:
    """BTF as drgn types, each made when it is asked for."""

    def __init__(self, program: drgn.Program, blob: bytes) -> None:
        self.program = program
        (header,) = struct.unpack_from("<I", blob, 4)
        at, size, strings, length = struct.unpack_from("<IIII", blob, 8)
        self.types = blob[header + at : header + at + size]
        self.strings = blob[header + strings : header + strings + length]
        self.at = [0]
        self.names: dict[tuple[int, str], int] = {}
        self.made: dict[int, drgn.Type] = {0: program.void_type()}
        at = 0
        while at < size:
            name, info, _ = struct.unpack_from("<III", self.types, at)
            kind, count = info >> 24 & 31, info & 0xFFFF
            self.names.setdefault((kind, self.string(name)), len(self.at))
            self.at.append(at)
            once, each = EXTRA.get(kind, (0, 0))
            at += 12 + once + count * each

    def string(self, at: int) -> str:
        return self.strings[at : self.strings.index(b"\0", at)].decode()

    def find(self, program, kinds, name, filename):
        for kind in kinds:
            for number in KIND.get(kind, ()):
                if (number, name) in self.names:
                    return self.type(self.names[number, name])
        return None

    def type(self, number: int) -> drgn.Type:
        if number not in self.made:
            self.made[number] = self.make(self.at[number])
        return self.made[number]

    def make(self, at: int) -> drgn.Type:  # noqa: PLR0911 - one for each kind
        program = self.program
        offset, info, size = struct.unpack_from("<III", self.types, at)
        kind, count, flag = info >> 24 & 31, info & 0xFFFF, info >> 31
        name, at = self.string(offset), at + 12
        match kind:
            case 1:
                (encoding,) = struct.unpack_from("<I", self.types, at)
                if encoding >> 24 & 4:
                    return program.bool_type(name, size)
                return program.int_type(name, size, bool(encoding >> 24 & 1))
            case 2:
                return program.pointer_type(self.type(size), 8)
            case 3:
                element, _, length = struct.unpack_from("<III", self.types, at)
                return program.array_type(self.type(element), length or None)
            case 4 | 5:
                make = program.struct_type if kind == 4 else program.union_type
                return make(name or None, size, list(self.members(at, count, flag)))
            case 6 | 19:
                form = {6: "<Ii" if flag else "<II", 19: "<III"}[kind]
                values = struct.iter_unpack(
                    form, self.types[at : at + count * struct.calcsize(form)]
                )
                whole = program.int_type("whole", size, bool(flag))
                names = [TypeEnumerator(self.string(one), value) for one, value, *_ in values]
                return program.enum_type(name or None, whole, names)
            case 7:
                make = program.union_type if flag else program.struct_type
                return make(name, None, None)
            case 8:
                return program.typedef_type(name, self.type(size))
            case _:
                return self.type(size) if kind in PLAIN else program.void_type()

    def members(self, at: int, count: int, flag: int):
        for name, number, where in struct.iter_unpack("<III", self.types[at : at + 12 * count]):
            offset, bits = (where & 0xFF_FFFF, where >> 24) if flag else (where, 0)
            yield TypeMember(self.member(number, bits), self.string(name) or None, offset)

    def member(self, number: int, bits: int):
        if bits:
            return lambda: Object(self.program, self.type(number), bit_field_size=bits)
        return lambda: self.type(number)


def drgn_program(attached) -> drgn.Program:
    """Return drgn's view of the guest of an `AttachedVm`."""
    program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    for slot in attached.ram.slots:
        ram = mmap.mmap(slot.file.fileno(), slot.size, offset=slot.offset, prot=mmap.PROT_READ)
        program.add_memory_segment(
            slot.gpa, slot.size, lambda _, n, at, physical, ram=ram: ram[at : at + n], True
        )
    program.set_linux_kernel_custom(attached.kernel.info.text, True)
    program.register_symbol_finder("kallsyms", load_vmlinux_kallsyms(program), enable_index=0)
    start, stop = (program.symbol(f"__{end}_BTF").address for end in ("start", "stop"))
    types = DrgnTypes(program, program.read(start, stop - start))
    program.register_type_finder("btf", types.find, enable_index=0)
    return program
