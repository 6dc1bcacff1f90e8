"""The memcpy limit: the bytes that a restore copies, between the very places it copies them.

A process has just been restored. The VM is held, its pages are looked up, and the same content is
copied over itself: from the image file to the frames in the RAM file, by plain memcpy in C, with as
many threads as `ovr` uses, both sides mapped and prefaulted. Nothing is checked, nothing is found
again, the VM is held once for all of it. So no copy of these bytes to these frames can be faster.
"""

import ctypes
import mmap
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ovr.images import ImageSet
from ovr.kernel import find_task, mm_space
from ovr.lab import LabVm
from ovr.lab.cache import cached, digest
from ovr.lab.tools import need_tool, run_tool
from ovr.memory.extents import split, total
from ovr.memory.ram import Slot
from ovr.plan import make_plan
from ovr.vm.attach import AttachedVm
from ovr.vm.hold import Holder

SOURCE = Path(__file__).parent / "programs" / "memcpy.c"
CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")
PIECE = np.dtype([("to", "<u8"), ("from", "<u8"), ("size", "<u8")])
LONGEST = 1 << 20
BOUND = 60.0  # seconds: all of it is copied in one hold


class MemcpyLimit:
    """Copies a restored process's pages over themselves; a context manager.

    Args:
        vm: the VM; QMP serves one at a time, so it is attached to for each copy only.
        images: of one process; `pid` is its pid in the guest.
    """

    def __init__(self, vm: LabVm, images: Path, pid: int) -> None:
        self._target, self._pid = f"lab:{vm.name}", pid
        self._threads = min(len(os.sched_getaffinity(0)), 8)
        self._copy = ctypes.CDLL(str(_library())).copy_pieces
        self._copy.restype = ctypes.c_double
        with ExitStack() as stack:
            plan = make_plan(stack.enter_context(ImageSet.open(images)))
            (task,) = plan.tasks
            ((_, self._pieces),) = task.pieces.items()
            path = images / task.memory.pages_name
            self._image = _mapped(stack, path, 0, path.stat().st_size, mmap.ACCESS_READ)
            with AttachedVm(self._target) as attached:
                self._slots = [
                    (slot.gpa, slot.size, _mapped(stack, _path(slot), slot.offset, slot.size, None))
                    for slot in attached.ram.slots
                ]
            self._stack = stack.pop_all()

    def __enter__(self) -> "MemcpyLimit":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def seconds(self) -> float:
        """Copy, and return how long it took."""
        with AttachedVm(self._target) as vm, Holder(vm.qmp, bound=BOUND) as holder, holder.held():
            space = mm_space(vm.kernel, find_task(vm.kernel, self._pid).mm)
            runs = space.walk(self._pieces)
            assert total(runs) == total(self._pieces), "pages of the restored process are missing"
            pieces = self._placed(np.concatenate(list(split(runs, LONGEST))))
            # SAFETY: the frames are the restored process's own, found in this hold, and the process
            # only waits for a signal, and the bytes written are those already there.
            took = self._copy(
                ctypes.c_void_p(pieces.ctypes.data), ctypes.c_uint64(len(pieces)), self._threads
            )
        assert took > 0
        return float(took)

    def _placed(self, runs) -> np.ndarray:
        pieces = np.zeros(len(runs), PIECE)
        pieces["from"] = self._image + runs["offset"].astype("<u8")
        pieces["size"] = runs["size"]
        for gpa, size, host in self._slots:
            here = (runs["gpa"] >= gpa) & (runs["gpa"] + runs["size"] <= gpa + size)
            pieces["to"][here] = host + (runs["gpa"][here] - np.uint64(gpa))
        assert pieces["to"].all(), "a page is not in RAM"
        return pieces


def _path(slot: Slot) -> Path:
    return Path(f"/proc/self/fd/{slot.file.fileno()}")


def _mapped(stack: ExitStack, path: Path, offset: int, size: int, access: int | None) -> int:
    # The address of a part of a file, mapped and populated.
    readable = access is not None
    fd = os.open(path, os.O_RDONLY if readable else os.O_RDWR)
    try:
        kind = mmap.PROT_READ if readable else mmap.PROT_READ | mmap.PROT_WRITE
        memory = mmap.mmap(
            fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=kind, offset=offset
        )
    finally:
        os.close(fd)
    stack.callback(memory.close)
    view = np.frombuffer(memory, np.uint8)
    return int(view.ctypes.data)


def _library() -> Path:
    def build(directory: Path) -> None:
        run_tool(
            [need_tool("gcc", "gcc"), *CFLAGS, str(SOURCE), "-o", str(directory / "memcpy.so")]
        )

    return cached(f"memcpy-{digest(SOURCE.read_bytes(), *CFLAGS)}", build) / "memcpy.so"
