"""Typed reads and writes on a piece of memory, with types made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr.errors import GuestFault, KernelNotFound, OvrError
from ovr.kernel.types.btf import Btf
from ovr.kernel.types.types import NoSuchType, Types
from ovr.kernel.types.view import (
    Array,
    DoesNotFit,
    NoSuchMember,
    OutOfBounds,
    Pointer,
    address_of,
    container_of,
)

from .writers import CONST, FUNC_PROTO, FWD, TYPEDEF, VAR, VOLATILE, BtfWriter, Memory

BASE = 0xFFFF_8880_0000_0000
TASK, FS, OTHER, TABLE, TEXT = (BASE + 0x1000 * n for n in range(1, 6))


def kernel_types() -> Types:
    w = BtfWriter()
    integer = w.integer("int", 4, signed=True)
    unsigned = w.integer("unsigned int", 4)
    ulong = w.integer("long unsigned int", 8)
    char = w.integer("char", 1, signed=True)
    u8 = w.integer("unsigned char", 1)
    short = w.integer("short int", 2, signed=True)
    boolean = w.integer("_Bool", 1, boolean=True)
    wide = w.integer("__int128 unsigned", 16)
    umode = w.add(TYPEDEF, "umode_t", w.add(CONST, "", w.add(VOLATILE, "", unsigned)))
    void_pointer = w.pointer(0)
    char_pointer = w.pointer(char)
    handler = w.pointer(w.add(FUNC_PROTO, "", 0))
    fs = w.struct("fs_struct", 16, ("users", integer, 0), ("umask", umode, 8))
    fs_pointer = w.pointer(fs)
    fs_table = w.pointer(fs_pointer)
    list_pointer = w.pointer()
    node = w.struct("list_head", 16, ("next", list_pointer, 0), ("prev", list_pointer, 8))
    w.point(list_pointer, node)
    rlimit = w.struct("rlimit", 16, ("rlim_cur", ulong, 0), ("rlim_max", ulong, 8))
    colour = w.enum("colour", RED=0, GREEN=7)
    inner = w.union("", 8, ("as_long", ulong, 0), ("as_int", integer, 0))
    outer = w.struct("", 16, ("", inner, 0), ("after", ulong, 8))
    forward = w.pointer(w.add(FWD, "fs_struct", 0))
    nowhere = w.pointer(w.add(FWD, "nowhere", 0))
    w.struct(
        "task_struct",
        512,
        ("pid", integer, 0),
        ("state", unsigned, 4),
        ("fs", fs_pointer, 8),
        ("comm", w.array(char, 16), 16),
        ("tasks", node, 32),
        ("rlim", w.array(rlimit, 4), 48),
        ("", outer, 112),
        ("fds", fs_table, 128),
        ("colour", colour, 136),
        ("frozen", boolean, 140),
        ("score", short, 142),
        ("data", void_pointer, 144),
        ("name", char_pointer, 152),
        ("key", w.array(u8, 4), 160),
        ("handler", handler, 168),
        ("huge", wide, 176),
        ("grid", w.array(w.array(integer, 3), 2), 192),
        ("forward", forward, 216),
        ("nowhere", nowhere, 224),
        ("__class__", integer, 232),
        ("address_", integer, 236),
        ("own", fs, 240),
        ("numbers", w.array(integer, 0), 256),
        ("from", integer, 300),
    )
    w.struct(
        "flags",
        16,
        ("low", unsigned, 0, 3),
        ("middle", integer, 3, 7),
        ("bit", unsigned, 10, 1),
        ("far", ulong, 61, 40),
    )
    w.add(VAR, "process_counts", ulong, b"\1\0\0\0")
    return Types(Btf(w.build()))


TYPES = kernel_types()


@pytest.fixture
def memory():
    made = Memory(BASE)
    made.poke(TASK, "iIQ16s", -5, 0xFFFF_FFFF, FS, b"init\0rubbish")
    made.poke(FS, "iiI", 1, 0, 0o22)
    made.poke(TASK + 32, "QQ", TASK + 32, OTHER + 32)
    return made


@pytest.fixture
def task(memory):
    return TYPES.object("struct task_struct", memory, TASK)


def test_it_reads_like_c(task):
    assert task.pid == -5
    assert task.state == 0xFFFF_FFFF
    assert task.fs.umask == 0o22
    assert task.comm == "init"
    assert repr(task) == f"<struct task_struct at {TASK:#x}>"


def test_a_write_is_exactly_the_member(task, memory):
    task.fs.umask = 0o137
    task.rlim[2].rlim_max = (1 << 64) - 1
    task.frozen = True
    task.score = -1000
    task.colour = 7
    task.huge = 1 << 127
    task.key[3] = 9
    assert memory.writes == [
        (FS + 8, (0o137).to_bytes(4, "little")),
        (TASK + 48 + 40, b"\xff" * 8),
        (TASK + 140, b"\1"),
        (TASK + 142, (-1000).to_bytes(2, "little", signed=True)),
        (TASK + 136, b"\7\0\0\0"),
        (TASK + 176, bytes(15) + b"\x80"),
        (TASK + 163, b"\x09"),
    ]
    assert (task.fs.umask, task.frozen, task.score, task.colour) == (0o137, True, -1000, 7)
    assert task.huge == 1 << 127
    assert bytes(task.key) == b"\0\0\0\x09"


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("pid", 1 << 31), ("pid", -(1 << 31) - 1), ("state", -1), ("state", 1 << 32),
        ("score", 40_000), ("frozen", 2), ("colour", -1), ("huge", 1 << 128),
        ("comm", "x" * 16), ("comm", "a\0b"), ("fs", -1), ("fs", 1 << 64), ("key", b"12345"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_not_written(task, memory, member, value):
    with pytest.raises(DoesNotFit, match=f"task_struct.{member} = ") as caught:
        setattr(task, member, value)
    assert isinstance(caught.value, OvrError | ValueError)
    assert memory.writes == []


@pytest.mark.parametrize("value", ["7", 1.5, None])
def test_a_value_of_another_type_is_a_mistake_of_ours(task, memory, value):
    with pytest.raises(TypeError):
        task.pid = value
    assert memory.writes == []


def test_text(task, memory):
    task.comm = "fifteen letters"
    assert task.comm == "fifteen letters"
    task.comm = "a"
    assert memory.read(TASK + 16, 16) == b"a".ljust(16, b"\0")
    memory.poke(TASK + 16, "16s", b"\xff\xfe" * 8)
    odd = task.comm
    task.comm = odd[:-1]
    assert memory.read(TASK + 16, 16) == (b"\xff\xfe" * 8)[:15] + b"\0"
    task.comm = b"\xc3"
    assert task.comm == "\udcc3"


def test_anonymous_members_are_the_outer_ones(task, memory):
    task.as_long = 0x1_0000_0002
    assert task.as_int == 2
    task.after = 5
    assert memory.writes[-1] == (TASK + 120, b"\5" + bytes(7))
    assert TYPES.offsetof("struct task_struct", "as_int") == 112


def test_null_says_which_member_is_null(task, memory):
    memory.poke(TASK + 8, "Q", 0)
    assert not task.fs
    with pytest.raises(GuestFault, match=r"task_struct\.fs is NULL: no fs_struct\.umask"):
        _ = task.fs.umask
    with pytest.raises(GuestFault, match=r"task_struct\.fs is NULL: no fs_struct\.umask"):
        task.fs.umask = 1
    assert memory.writes == []


def test_a_wild_pointer_says_where(task, memory):
    memory.poke(TASK + 8, "Q", 0x1234_0000)
    with pytest.raises(
        GuestFault, match=r"fs_struct\.umask of the object at 0x12340000: "
    ) as caught:
        _ = task.fs.umask
    assert caught.value.address == 0x1234_0008
    with pytest.raises(GuestFault, match=r"fs_struct\.umask of the object"):
        task.fs.umask = 1


def test_missing_members(task, memory):
    with pytest.raises(NoSuchMember, match="struct task_struct has no member cred"):
        _ = task.cred
    with pytest.raises(AttributeError):
        task.cred = 1
    assert getattr(task, "cred", None) is None
    assert issubclass(NoSuchMember, KernelNotFound)
    assert memory.writes == []


def test_pointers_to_structs(task, memory):
    assert task.fs == TYPES.pointer("struct fs_struct", memory, FS)
    assert task.fs != TYPES.pointer("struct fs_struct", memory, FS + 16)
    assert task.fs != TYPES.pointer("struct rlimit", memory, FS)
    other = TYPES.pointer("struct fs_struct", memory, OTHER)
    task.fs = other
    assert task.fs == other
    assert len({task.fs, other}) == 1
    task.fs = None
    assert not task.fs
    task.fs = FS
    assert task.fs.address_ == FS
    with pytest.raises(TypeError, match="struct fs_struct is wanted, not a struct task_struct"):
        task.fs = task
    assert task.fs[2].address_ == FS + 32
    with pytest.raises(TypeError):
        iter(task.fs)


def test_other_pointers(task, memory):
    memory.poke(TASK + 128, "Q", TABLE)
    memory.poke(TABLE, "QQ", FS, OTHER)
    assert [task.fds[n].address_ for n in (0, 1)] == [FS, OTHER]
    task.fds[1] = task.fs
    assert memory.writes == [(TABLE + 8, FS.to_bytes(8, "little"))]
    assert isinstance(task.data, Pointer)
    assert not task.data
    assert task.data == 0
    with pytest.raises(GuestFault, match=r"task_struct\.data is NULL"):
        _ = task.data[0]
    task.data = FS
    assert task.data == task.fs
    assert task.fs == task.data
    assert int(task.data) == FS
    with pytest.raises(TypeError, match="points to void"):
        _ = task.data[0]
    assert task.data.cast_("struct fs_struct").umask == 0o22
    assert task.fs.cast_("unsigned int")[2] == 0o22
    task.handler = 0x7F00_0000_1234
    assert task.handler == 0x7F00_0000_1234


def test_strings(task, memory):
    memory.poke(TEXT, "400s", b"x" * 300 + b"\0rest")
    memory.poke(TASK + 152, "Q", TEXT)
    assert task.name.string_() == b"x" * 300
    with pytest.raises(GuestFault, match="no string of 200 bytes"):
        task.name.string_(200)
    end = BASE + len(memory.data)
    memory.poke(end - 4, "4s", b"abc\0")
    memory.poke(TASK + 152, "Q", end - 4)
    assert task.name.string_() == b"abc"
    memory.poke(end - 1, "c", b"d")
    with pytest.raises(GuestFault, match="not mapped"):
        task.name.string_()


def test_arrays_are_bounded(task):
    assert len(task.rlim) == 4
    for index in (-1, 4, 1 << 70):
        with pytest.raises(OutOfBounds, match=r"task_struct\.rlim\[.*\]: it has 4 elements"):
            _ = task.rlim[index]
        with pytest.raises(IndexError):
            task.key[index] = 1
    assert issubclass(OutOfBounds, GuestFault)
    for number, limit in enumerate(task.rlim):
        limit.rlim_cur = number
    assert [limit.rlim_cur for limit in task.rlim] == [0, 1, 2, 3]


def test_arrays_of_arrays_and_of_unknown_length(task, memory):
    memory.poke(TASK + 192, "6i", *range(6))
    assert [list(row) for row in task.grid] == [[0, 1, 2], [3, 4, 5]]
    task.grid[1] = [7, 8, 9]
    assert list(task.grid[1]) == [7, 8, 9]
    with pytest.raises(DoesNotFit, match="2 values for 3 elements"):
        task.grid[0] = [1, 2]
    memory.poke(TASK + 256, "3i", 10, 11, 12)
    assert len(task.numbers) == 0
    with pytest.raises(OutOfBounds):
        _ = task.numbers[0]
    numbers = task.numbers.resized(3)
    assert isinstance(numbers, Array)
    assert list(numbers) == [10, 11, 12]


def test_structs_are_copied_as_in_c(task, memory):
    task.own = task.fs
    assert memory.writes == [(TASK + 240, memory.read(FS, 16))]
    assert task.own.umask == 0o22
    assert task.own != task.fs
    with pytest.raises(TypeError, match="struct fs_struct is wanted"):
        task.own = task.tasks
    with pytest.raises(TypeError, match="struct fs_struct is wanted, not a int"):
        task.own = 5


def test_declared_here_defined_elsewhere(task, memory):
    memory.poke(TASK + 216, "QQ", FS, FS)
    assert task.forward.umask == 0o22
    assert isinstance(task.nowhere, Pointer)


def test_names_that_are_not_the_kernels_to_take(task, memory):
    assert task.address_ == TASK
    assert task.__class__.__name__ == "task_struct"
    memory.poke(TASK + 300, "i", 77)
    assert getattr(task, "from") == 77


def test_container_of_and_address_of(task, memory):
    assert container_of(task.tasks, "struct task_struct", "tasks") == task
    assert container_of(task.tasks.next, "struct task_struct", "tasks").pid == -5
    pointer = address_of(task, "rlim[2].rlim_max")
    assert pointer.address_ == TASK + 88
    assert container_of(pointer, "struct task_struct", "rlim[2].rlim_max") == task
    pointer[0] = 6
    assert task.rlim[2].rlim_max == 6
    assert address_of(task, "own") == task.own
    assert address_of(task, "own").umask == 0
    assert address_of(task, "comm")[0] == "init"
    assert address_of(task.rlim[1], "rlim_max").address_ == TASK + 48 + 24


@pytest.mark.parametrize("path", ["nope", "pid.x", "rlim.x", "pid[0]", "as_long.y"])
def test_paths_that_lead_nowhere(path):
    with pytest.raises(NoSuchMember):
        TYPES.offsetof("struct task_struct", path)


def test_paths_that_are_none():
    for path in ("rlim[", "!", "rlim[x]"):
        with pytest.raises((ValueError, NoSuchMember)):
            TYPES.offsetof("struct task_struct", path)
    with pytest.raises(NoSuchMember):
        TYPES.offsetof("struct flags", "low")


def test_type_names_as_in_c(memory):
    assert TYPES.sizeof("struct task_struct") == TYPES.sizeof("task_struct") == 512
    assert TYPES.sizeof("unsigned long") == 8
    assert TYPES.sizeof("umode_t") == 4
    assert TYPES.sizeof("enum colour") == 4
    assert TYPES.sizeof("struct fs_struct **") == TYPES.sizeof("void *") == 8
    assert TYPES.enum("enum colour")["GREEN"] == 7
    assert "struct task_struct" in TYPES
    assert "struct nope" not in TYPES
    for name in ("union task_struct", "struct umode_t", "struct", "a + b", ""):
        with pytest.raises(NoSuchType):
            TYPES.codec(name)
    with pytest.raises(NoSuchType, match="no enum"):
        TYPES.enum("struct fs_struct")
    with pytest.raises(NoSuchType, match="no struct"):
        TYPES.struct("int")
    memory.poke(TABLE, "Q", FS)
    assert TYPES.object("struct fs_struct *", memory, TABLE).umask == 0o22
    assert TYPES.object("struct fs_struct **", memory, TABLE)[0].address_ == 1
    assert TYPES.variable("process_counts").size == 8
    assert TYPES.variable("runqueues") is None


@given(st.data())
def test_bitfields_against_plain_arithmetic(data):
    memory = Memory(BASE)
    before = data.draw(st.integers(0, (1 << 128) - 1))
    memory.data[0x1000:0x1010] = before.to_bytes(16, "little")
    flags = TYPES.object("struct flags", memory, TASK)
    name, first, width, signed = data.draw(
        st.sampled_from(
            [("low", 0, 3, 0), ("middle", 3, 7, 1), ("bit", 10, 1, 0), ("far", 61, 40, 0)]
        )
    )
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    raw = before >> first & (1 << width) - 1
    assert getattr(flags, name) == (raw - (1 << width) if raw > high else raw)
    value = data.draw(st.integers(low, high))
    setattr(flags, name, value)
    assert getattr(flags, name) == value
    mask = (1 << width) - 1 << first
    after = int.from_bytes(memory.data[0x1000:0x1010], "little")
    assert after == before & ~mask | value << first & mask
    for wrong in (low - 1, high + 1):
        with pytest.raises(DoesNotFit):
            setattr(flags, name, wrong)


@given(st.integers(-(1 << 70), 1 << 70), st.sampled_from(["pid", "state", "score", "as_long"]))
def test_an_integer_is_written_whole_or_not_at_all(value, name):
    memory = Memory(BASE)
    task = TYPES.object("struct task_struct", memory, TASK)
    low, high = {
        "pid": (-(1 << 31), (1 << 31) - 1), "state": (0, (1 << 32) - 1),
        "score": (-(1 << 15), (1 << 15) - 1), "as_long": (0, (1 << 64) - 1),
    }[name]  # fmt: skip
    if low <= value <= high:
        setattr(task, name, value)
        assert getattr(task, name) == value
    else:
        with pytest.raises(DoesNotFit):
            setattr(task, name, value)
        assert memory.writes == []


def test_few_structs_that_have_each_other_often():
    """4^20 anonymous members without a name among them: a walk that would not end in years."""
    w = BtfWriter()
    inner = w.struct("", 0)
    for _ in range(20):
        inner = w.struct("", 0, *[("", inner, 0)] * 4)
    outer = w.struct("outer", 0, ("", inner, 0))
    types = Types(Btf(w.build()))
    with pytest.raises(KernelNotFound, match="too many members"):
        types.fields(outer)
