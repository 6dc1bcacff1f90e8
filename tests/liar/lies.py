"""A guest that lies: a process beside QEMU that rewrites what the guest's kernel says of itself.

Root of a guest owns all of its memory. So does who writes to the VM's RAM file, and needs no kernel
module for it; and it goes on while the VM is held, when a guest could not. Each lie stands for
some milliseconds, then what was there before comes back, so that most guests live through it.

``python -m tests.liar.lies VM KIND SEED PID``: says ``ready``, and lies until its input ends.
"""

import random
import select
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from ovr.errors import OvrError
from ovr.kernel import Kernel, Struct, find_task, mm_space
from ovr.kernel.linux.tasks import for_each_process
from ovr.memory.addresses import PAGE_SIZE, Gpa, Gva
from ovr.memory.ram import GuestRam
from ovr.vm.attach import AttachedVm

WORD = struct.Struct("<Q")
ENTRIES = 512
PRESENT, HUGE, TABLE = 1, 1 << 7, 0x000F_FFFF_FFFF_F000
NEW_AREAS_EVERY = 0.5
"""Seconds: the skeleton comes and goes."""


@dataclass(frozen=True)
class Area:
    """A part of guest RAM that can be lied about; whole words."""

    gpa: Gpa
    size: int


@dataclass(frozen=True)
class Victim:
    """The guest, and the pid of the tree's root."""

    kernel: Kernel
    pid: int

    @property
    def task(self) -> Struct | None:
        """The skeleton's root, while it stands."""
        task = find_task(self.kernel, self.pid)
        return task or None


def of_kernel(kernel: Kernel, gva: Gva, size: int) -> Iterator[Area]:
    """The areas, page by page, of a range of the kernel's addresses."""
    at, end = gva - gva % 8, gva + size
    while at < end:
        length = min(end - at, PAGE_SIZE - at % PAGE_SIZE)
        yield Area(kernel.space.translate(Gva(at)), length - length % 8)
        at += length


def vmcoreinfo(victim: Victim) -> Iterator[Area]:
    info = victim.kernel.info
    yield Area(info.gpa, len(info.text) // 8 * 8)


def kallsyms(victim: Victim) -> Iterator[Area]:
    kernel = victim.kernel
    tables = sorted(kernel.info.symbols[name] for name in kernel.info.symbols if "kallsyms" in name)
    for table in tables:
        yield from of_kernel(kernel, table, 1 << 18)


def btf(victim: Victim) -> Iterator[Area]:
    kernel = victim.kernel
    start, stop = kernel.symbol("__start_BTF"), kernel.symbol("__stop_BTF")
    yield from of_kernel(kernel, start, 64)  # its header counts as much as all of the rest
    yield from of_kernel(kernel, start, stop - start)


def tasks(victim: Victim) -> Iterator[Area]:
    """The list of all processes, and all that the skeleton's root has."""
    kernel = victim.kernel
    offset = kernel.types.offsetof("struct task_struct", "tasks")
    for number, task in enumerate(for_each_process(kernel)):
        yield from of_kernel(kernel, Gva(task.address_ + offset), 8)
        if number > 100:
            break
    if root := victim.task:
        for of, size in (
            (root, kernel.types.sizeof("struct task_struct")),
            (root.mm, 1024),
            (root.signal, 1024),
            (root.thread_pid, 128),
            (root.fs, 64),
            (root.files, 256),
        ):
            yield from of_kernel(kernel, of.address_, size)


def page_tables(victim: Victim) -> Iterator[Area]:
    """The page tables of the skeleton's root, and what struct page says of its pages."""
    kernel, root = victim.kernel, victim.task
    if not root:
        return
    space, frames = mm_space(kernel, root.mm), kernel.private_frames
    level = [space.root]
    for depth in range(space.levels):
        below = []
        for table in level[:8]:
            # The kernel's half is everybody's.
            entries = victim.kernel.ram.read(table, PAGE_SIZE // (1 if depth else 2))
            yield Area(table, len(entries))
            for (entry,) in WORD.iter_unpack(entries):
                if entry & PRESENT and not (depth and entry & HUGE):
                    below.append(Gpa(entry & TABLE))
                elif entry & PRESENT:
                    page = Gva(frames.vmemmap + (entry & TABLE) // PAGE_SIZE * frames.stride)
                    yield from of_kernel(kernel, page, frames.stride)
        level = below


KINDS: dict[str, Callable[[Victim], Iterator[Area]]] = {
    "vmcoreinfo": vmcoreinfo,
    "kallsyms": kallsyms,
    "btf": btf,
    "tasks": tasks,
    "page-tables": page_tables,
}
MOVES = {"tasks", "page-tables"}
"""Those where the areas are others once the skeleton stands."""


def lie(chance: random.Random, areas: list[Area], truth: int, other: int) -> int:
    """Return the replacement of a word."""
    flags = truth & ~TABLE
    return chance.choice(
        [
            chance.getrandbits(64),
            truth ^ 1 << chance.randrange(64),
            chance.choice([0, (1 << 64) - 1, 1 << 63, 0x7FFF_FFFF_F000]),
            other,
            (chance.choice(areas).gpa & TABLE) | flags,  # another of the tables, or itself
            (chance.getrandbits(40) * PAGE_SIZE & TABLE) | flags,  # out of RAM
            (truth + chance.randint(-64, 64)) % (1 << 64),
        ]
    )


def lies(vm: AttachedVm, ram: GuestRam, kind: str, seed: str, pid: int) -> None:
    """Lie until standard input ends, then make all true again."""
    chance = random.Random(seed)
    victim = Victim(vm.kernel, pid)
    areas, looked = found(victim, kind), time.monotonic()
    print("ready", flush=True)
    while not select.select([0], [], [], chance.random() * 0.01)[0]:
        if kind in MOVES and time.monotonic() > looked + NEW_AREAS_EVERY:
            areas, looked = found(victim, kind), time.monotonic()
        if not areas:
            continue
        told = []
        for _ in range(chance.choice([1, 1, 3, 20])):
            area = chance.choice(areas)
            gpa = Gpa(area.gpa + 8 * chance.randrange(area.size // 8))
            (truth,) = WORD.unpack(ram.read(gpa, 8))
            told.append((gpa, truth))
            other = chance.choice([truth, *(truth for _, truth in told)])
            # SAFETY: none. The guest is there to be harmed.
            ram.write(gpa, WORD.pack(lie(chance, areas, truth, other)))
        time.sleep(chance.choice([0, 0.001, 0.01, 0.1]))
        for gpa, truth in reversed(told):
            ram.write(gpa, WORD.pack(truth))


def found(victim: Victim, kind: str) -> list[Area]:
    # Our own lies are taken back before we look; but the guest lives.
    areas: list[Area] = []
    with suppress(OvrError):
        areas.extend(area for area in KINDS[kind](victim) if area.size >= 8)
    return areas


def main() -> None:
    spec, kind, seed, pid = sys.argv[1:]
    with AttachedVm(spec) as vm, GuestRam(vm.ram.slots, writable=True, unheld=True) as ram:
        vm.qmp.close()  # it serves one, and that is `ovr`
        lies(vm, ram, kind, seed, int(pid))


if __name__ == "__main__":
    main()
