"""Targets: hostile guest memory under a whole kernel and under its containers."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice

from ovr.kernel import Kernel, find_task, find_vma, processes, vmas
from ovr.kernel.linux.list import list_for_each_entry
from ovr.kernel.linux.maple import mt_for_each
from ovr.kernel.linux.rbtree import rbtree_for_each_entry
from ovr.kernel.linux.xarray import idr_find, xa_load
from ovr.memory.addresses import Gpa, Gva
from tests.fuzz.kernel import scratch
from tests.fuzz.patches import patched, sample_patches
from tests.fuzz.target import Input, Target
from tests.unit.kernel.toy import BTF, TYPES, ToyKernel, toy_btf
from tests.unit.kernel.writers import Memory
from tests.unit.machine import Machine

__all__ = ["TARGETS"]

BASE = 0xFFFF_8880_0000_0000
HEAD = BASE + 0x100
WORDS = 512
"""The containers live in so many words, so that wild pointers often hit something."""


# ---- containers --------------------------------------------------------------------------

WALKS: tuple[Callable[[Memory], object], ...] = (
    lambda m: list(list_for_each_entry("struct item", view("list_head", m), "link")),
    lambda m: list(rbtree_for_each_entry("struct item", view("rb_root", m), "rb")),
    lambda m: list(islice(mt_for_each(view("maple_tree", m)), 1 << 16)),
    lambda m: [xa_load(view("xarray", m), index) for index in (0, 63, 64, 1 << 20, (1 << 64) - 1)],
    lambda m: [idr_find(view("idr", m), number) for number in (0, 1, 4095, 1 << 22)],
)


def view(name: str, memory: Memory) -> object:
    return TYPES.object(f"struct {name}", memory, Gva(HEAD))


def containers(data: bytes) -> None:
    """A word of memory takes three bytes: where it points to in this memory, and its low bits."""
    source = Input(data)
    walk = WALKS[source.number() % len(WALKS)]
    memory = Memory(BASE, 8 * WORDS)
    at = 0
    while source and at < WORDS:
        kind, value = source.number(), source.number(2)
        words = 1 + (kind >> 4)
        for _ in range(words):
            if at < WORDS:
                memory.poke(BASE + 8 * at, "Q", _word(kind & 15, value))
            at += 1
    walk(memory)


def _word(kind: int, value: int) -> int:
    match kind:
        case 0:
            return value
        case 1:
            return (1 << 64) - 1 - value
        case 2:
            return value << 48 | value
        case 3:
            return BASE + value
        case _:  # a pointer to something aligned, with the bits that containers put there
            return BASE + (value * 8) % (8 * WORDS) + (kind & 7)


def containers_seeds() -> Iterator[bytes]:
    for number in range(len(WALKS)):
        for kind in range(16):
            yield bytes([number]) + bytes([kind | 0xF0, kind * 3, 0]) * 32
            for target in (0, 32, 64, 96):
                yield bytes([number]) + bytes([kind, target, 0, 4, target + 8, 0]) * 128


# ---- a whole kernel ----------------------------------------------------------------------


@cache
def toy() -> tuple[ToyKernel, list[tuple[int, bytes]]]:
    """A kernel with a few processes, and the parts of its RAM that can be damaged."""
    home = scratch() / "ram"
    home.mkdir()
    kernel = ToyKernel(Machine.build(home))
    init = kernel.fork(2, "kthreadd")
    kernel.fork(70, "server", parent=init)
    kernel.fork(71, "server", leader=kernel.fork(72, "worker"))
    size = len(toy_btf())
    note = kernel.machine.ram.read(Gpa(kernel.note), 4096).partition(b"\0")[0]
    where = [
        (kernel.note, len(note) + 1),
        (kernel.image, 0x6000),
        (kernel.image + 0x1_0000, 0x1000),
        (kernel.image + BTF, size),
        (kernel.heap, kernel.free - kernel.heap),
        (4096, len(kernel.machine.tables) * 4096),
    ]
    return kernel, [(at, kernel.machine.ram.read(Gpa(at), length)) for at, length in where]


def whole(data: bytes) -> None:
    """Find the kernel in RAM that was damaged, and list its processes."""
    made, parts = toy()
    ram = made.machine.ram
    damaged = patched([content for _, content in parts], Input(data))
    try:
        for (at, content), new in zip(parts, damaged, strict=True):
            if new is not content:
                ram.write(Gpa(at), new[: len(content)].ljust(len(content), b"\0"))
        use(Kernel.find(ram))
    finally:
        for at, content in parts:
            ram.write(Gpa(at), content)


def use(kernel: Kernel) -> None:
    kernel.same_boot()
    kernel.wall_clock()
    kernel.private_frames  # noqa: B018 - may it be asked for?
    for process in processes(kernel):
        task = find_task(kernel, process.pid)
        if task and task.mm:
            vmas(task.mm)
            find_vma(task.mm, Gva(4096))


def whole_seeds() -> Iterator[bytes]:
    _, parts = toy()
    yield from sample_patches([content for _, content in parts])
    for which, (_, content) in enumerate(parts):
        for at in range(0, min(len(content), 1 << 12), 96):
            yield bytes([which, 6]) + at.to_bytes(2, "little") + b"\x40"


TARGETS = (
    Target("containers", containers_seeds, containers),
    Target("kernel", whole_seeds, whole),
)
