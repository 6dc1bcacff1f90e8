"""DWARF as compilers write it, made into BTF: what it says is what the compiled program says."""

import ast
import re
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ovr
from ovr.errors import OvrError, UsageError
from ovr.kernel.types import dwarf
from ovr.kernel.types.btf import Btf, Composite, Forward, Kind, Pointer
from ovr.kernel.types.dwarf import ROOTS, dwarf_to_btf
from ovr.kernel.types.types import Types

BUILD_ID = "0123456789abcdef0123456789abcdef01234567"

COMMON = """
#include <stddef.h>
#include <stdio.h>
typedef unsigned long long u64; typedef int __kernel_pid_t; typedef __kernel_pid_t pid_t;
struct late; struct nowhere; struct empty {};
struct list_head { struct list_head *next, *prev; };
enum pid_type { PIDTYPE_PID, PIDTYPE_TGID, PIDTYPE_MAX = 4 };
enum sign { BELOW = -2, ABOVE = 7 };
enum wide { WIDE_LOW = 1, WIDE_HIGH = 0x8000000000000001ULL };
enum wide_sign { WIDE_BELOW = -0x100000001LL, WIDE_ABOVE = 2 };
typedef struct { volatile int counter; } atomic_t;
"""
FIRST = """
struct pid { atomic_t count; struct list_head tasks[PIDTYPE_MAX]; pid_t numbers[]; };
struct task_struct {
    const char *name; volatile long state; char comm[16]; _Bool on; signed char nice;
    struct late *late; struct nowhere *nowhere; struct empty empty; u64 clock;
    union { struct { int a, b; }; u64 both; };
    union { struct list_head node; void *data; } named;
    unsigned one : 1; unsigned seven : 7; unsigned :5; unsigned wide : 20;
    u64 long_bits : 33; int negative : 3;
    enum pid_type type; enum pid_type short_type : 2; enum sign sign; enum wide large;
    enum wide_sign large_sign; int grid[2][3][5]; int none[0];
    int (*function)(struct task_struct *, long); unsigned *percpu;
    char *const *restrict argv; double ratio; __int128 huge;
    struct { short x; struct { char y; } deep[3]; } inner;
    struct pid *pid; pid_t *pids[2];
};
struct task_struct task; struct pid pid;
extern int second(void);
"""
SECOND = """
struct early { struct late *late; };
struct late { char first; struct list_head where; struct early *early; };
struct late late; struct early early;
int second(void) { return late.first; }
"""
STRUCTS = {
    "struct task_struct": (
        *("name", "state", "comm", "on", "nice", "late", "nowhere", "empty", "clock", "a", "b"),
        *("both", "named", "named.node.prev", "type", "sign", "large", "large_sign", "grid"),
        *("none", "function", "percpu", "argv", "ratio", "huge", "inner", "inner.deep", "pid"),
        *("pids",),
    ),
    "struct pid": ("count", "count.counter", "tasks", "tasks[3]", "tasks[2].prev", "numbers"),
    "struct list_head": ("next", "prev"),
}
ENUMS = {
    "enum pid_type": ("PIDTYPE_PID", "PIDTYPE_TGID", "PIDTYPE_MAX"),
    "enum sign": ("BELOW", "ABOVE"),
    "enum wide": ("WIDE_LOW", "WIDE_HIGH"),
    "enum wide_sign": ("WIDE_BELOW", "WIDE_ABOVE"),
}
BITS = {"one": 1, "seven": 7, "wide": 20, "long_bits": 33, "negative": 3, "short_type": 2}
WANTED = (*STRUCTS, *ENUMS, "struct late", "struct early", "struct absent")


def main() -> str:
    lines = []
    for name, members in STRUCTS.items():
        lines.append(f'printf("{name}=%zu\\n", sizeof({name}));')
        for path in members:
            lines.append(f'printf("{name} {path}=%zu\\n", offsetof({name}, {path}));')
    for name, values in ENUMS.items():
        form, cast = ("%lld", "(long long)") if "sign" in name else ("%llu", "(u64)")
        lines += [f'printf("{name} {v}={form}\\n", {cast} {v});' for v in values]
    for name, bits in BITS.items():
        # Where the ones are in the struct's bytes when the bitfield is full of them.
        lines.append(
            f"{{ struct task_struct t = {{}}; t.{name} = -1; int f = -1, n = 0;"
            "for (size_t i = 0; i < 8 * sizeof t; i++)"
            "if (((unsigned char *)&t)[i / 8] >> i % 8 & 1) { if (f < 0) f = i; n++; }"
            f'printf("bits {name}=%d\\nbits {name} {bits}=%d\\n", f, n); }}'
        )
    return "int main(void) { second();" + "\n".join(lines) + "return 0; }"


def build(directory: Path, *options: str) -> Path:
    sources = []
    for name, text in (("first", COMMON + FIRST + main()), ("second", COMMON + SECOND)):
        sources.append(directory / f"{name}.c")
        sources[-1].write_text(text)
    path = directory / "program"
    gcc = ["gcc", "-g", "-w", f"-Wl,--build-id=0x{BUILD_ID}", "-o", path, *options, *sources]
    subprocess.run(gcc, check=True)
    return path


@pytest.fixture(
    scope="module",
    params=[
        ["-gdwarf-5"],
        ["-gdwarf-4"],
        ["-gdwarf-3", "-gstrict-dwarf"],
        ["-gdwarf-2", "-gstrict-dwarf"],
        ["-gdwarf-5", "-gz=zlib"],
        ["-gdwarf-5", "-fno-merge-debug-strings"],
    ],
    ids=" ".join,
)
def program(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("program"), *request.param)


def test_what_the_program_says_of_itself(program):
    data = dwarf_to_btf(program, "", WANTED)
    types = Types(Btf(data))
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    fields = types.fields(next(types.btf.find("task_struct", Kind.STRUCT)))
    checked = 0
    for line in said.splitlines():
        what, _, number = line.rpartition("=")
        keyword, name, *rest = what.split()
        match keyword, rest:
            case "bits", []:
                assert 8 * fields[name].offset + fields[name].first == int(number), line
            case "bits", [_]:
                assert fields[name].bits == int(number), line
            case "enum", [value]:
                assert types.enum(f"enum {name}")[value] == int(number), line
            case "struct", []:
                assert types.sizeof(f"struct {name}") == int(number), line
            case "struct", [path]:
                assert types.offsetof(f"struct {name}", path) == int(number), line
        checked += 1
    listed = sum(map(len, (*STRUCTS.values(), *ENUMS.values())))
    assert checked == len(STRUCTS) + listed + 2 * len(BITS)
    assert "struct absent" not in types


def test_types_of_members(program):
    types = Types(Btf(dwarf_to_btf(program, "", WANTED)))
    task = types.btf.type(next(types.btf.find("task_struct", Kind.STRUCT)))
    assert isinstance(task, Composite)
    sizes = {member.name: types.btf.sizeof(member.type) for member in task.members}
    sized = {"comm": 16, "on": 1, "grid": 120, "none": 0, "function": 8, "huge": 16, "pids": 16}
    assert sized.items() <= sizes.items()
    found = {member.name: types.btf.resolve(member.type)[1] for member in task.members}
    assert found["on"].boolean
    assert found["nice"].signed
    assert found["argv"] == Pointer(found["argv"].target)
    nowhere = types.btf.resolve(found["nowhere"].target)[1]
    assert nowhere == Forward("struct", "nowhere")
    assert types.codec("pid_t").size == 4
    pid = types.btf.type(next(types.btf.find("pid", Kind.STRUCT)))
    assert types.btf.type(pid.members[-1].type).count == 0


def test_what_is_only_declared_is_completed_by_another_unit(program):
    types = Types(Btf(dwarf_to_btf(program, "", WANTED)))
    assert types.offsetof("struct late", "where") == 8
    task = next(types.btf.find("task_struct", Kind.STRUCT))
    codec = types._field_codec(types.fields(task)["late"])
    assert types.classes[codec.type_id] is types.struct("struct late")


def test_the_first_root_brings_only_its_own(program):
    types = Types(Btf(dwarf_to_btf(program, "", ("struct pid",))))
    assert "struct list_head" in types
    assert "struct task_struct" not in types


def test_names_that_are_not_offsets(program, monkeypatch):
    """As of compilers that number the names: then all types are gone through."""
    whole = Types(Btf(dwarf_to_btf(program, "", WANTED)))
    monkeypatch.setattr(dwarf, "_mentions", lambda data, references: [])
    types = Types(Btf(dwarf_to_btf(program, "", WANTED)))
    for name in (*STRUCTS, "struct late", "struct early"):
        assert types.sizeof(name) == whole.sizeof(name)


def test_it_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build(tmp_path)
    made = dwarf_to_btf(path, BUILD_ID, WANTED)
    monkeypatch.setattr(dwarf, "_convert", lambda path, roots: pytest.fail("made again"))
    assert dwarf_to_btf(path, BUILD_ID, WANTED) == made
    path.touch()
    with pytest.raises(pytest.fail.Exception):
        dwarf_to_btf(path, BUILD_ID, WANTED)


def test_every_type_that_is_named_is_a_root():
    package = Path(ovr.__file__).parent
    pattern = re.compile(r"((?:struct|union|enum) \w+) ?\**")
    named = set()
    for path in package.rglob("*.py"):
        if "guest" in path.relative_to(package).parts:
            continue  # that is C source
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                match = pattern.fullmatch(node.value)
                named |= {match[1]} if match else set()
    assert len(named) > 20
    assert named <= set(ROOTS)


def test_files_without(tmp_path, program):
    plain = tmp_path / "plain"
    subprocess.run(["strip", "-g", "-o", plain, program], check=True)
    text = tmp_path / "text"
    text.write_text("no ELF")
    for path, roots, message in (
        (plain, WANTED, "no section .debug_info"),
        (text, WANTED, "no usable DWARF"),
        (program, ("struct absent",), "none of the types"),
        (tmp_path / "nowhere", WANTED, "No such file"),
    ):
        with pytest.raises(UsageError, match=message):
            dwarf_to_btf(path, "", roots)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_ends_in_no_other_error(damageable, data):
    path, content, places = damageable
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 12))):
        start, size = data.draw(st.sampled_from(places))
        changed[data.draw(st.integers(start, start + size - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    started = time.monotonic()
    try:
        types = Types(Btf(dwarf_to_btf(path, "", WANTED)))
        for name in WANTED:
            if name in types and name.startswith("struct"):
                types.fields(next(types.btf.find(name.split()[1], Kind.STRUCT, Kind.UNION)))
    except OvrError:
        pass
    assert time.monotonic() - started < 20


@pytest.fixture(scope="module")
def damageable(tmp_path_factory):
    """A file to damage, what is in it, and where its DWARF is."""
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    path = build(tmp_path_factory.mktemp("damaged"))
    with path.open("rb") as file:
        elf = ELFFile(file)
        sections = map(elf.get_section_by_name, (".debug_info", ".debug_abbrev", ".debug_str"))
        places = [(section["sh_offset"], section["sh_size"]) for section in sections]
    return path, path.read_bytes(), places
