"""The lab guest's initramfs: our init, our agent, and the kernel modules that reach the disk.

A cpio archive in the kernel's newc form (Documentation/driver-api/early-userspace/buffer-format).
"""

import lzma
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ovr.errors import LabError

__all__ = ["cpio", "initramfs", "module_plan", "unpacked_module"]


def module_plan(modules_dep: str, builtin: str, wanted: Sequence[str]) -> list[str]:
    """Return the module files to load, in order, each once: what each wanted one needs, then it.

    Args:
        modules_dep: the text of ``modules.dep``; its dependencies come in reverse load order.
        builtin: the text of ``modules.builtin``: modules that this kernel has without loading.
        wanted: module names as in their file names, such as ``virtio_blk``.

    Raises:
        LabError: the kernel has no such module.
    """
    needs: dict[str, list[str]] = {}
    for line in modules_dep.splitlines():
        path, _, before = line.partition(":")
        needs[_module_name(path)] = [*reversed(before.split()), path]
    present = {_module_name(path) for path in builtin.splitlines()}
    order: dict[str, None] = {}
    for name in wanted:
        if name in present:
            continue
        if name not in needs:
            raise LabError(f"the guest's kernel has no module {name}")
        order.update(dict.fromkeys(needs[name]))
    return list(order)


def unpacked_module(path: str, data: bytes) -> bytes:
    """Return a module's ELF file, whatever it is packed with.

    Raises:
        LabError: packed in a way that we do not know.
    """
    if path.endswith(".ko"):
        return data
    if path.endswith(".ko.xz"):
        return lzma.decompress(data)
    if path.endswith(".ko.gz"):
        return zlib.decompress(data, wbits=31)
    raise LabError(f"the guest's kernel module {path} is packed in a way the lab does not know")


def initramfs(init: bytes, agent: bytes, modules: Iterable[bytes]) -> bytes:
    """Return the archive; the modules are numbered so that their names sort in load order."""
    files = {f"modules/{number:02}.ko": data for number, data in enumerate(modules)}
    return cpio({"init": init, "ovr-agent": agent, **files})


def cpio(files: Mapping[str, bytes]) -> bytes:
    """Return a newc archive of executable files, with the directories they are in."""
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}
    entries: list[tuple[str, int, bytes]] = [
        (name, stat.S_IFDIR | 0o755, b"") for name in sorted(folders)
    ]
    entries += [(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    entries.append(("TRAILER!!!", 0, b""))
    return b"".join(part for number, entry in enumerate(entries) for part in _entry(number, *entry))


def _entry(number: int, name: str, mode: int, data: bytes) -> Iterator[bytes]:
    # Inode, mode, uid, gid, links, mtime, size, device, rdevice, name size, checksum.
    path = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    yield header + bytes(-len(header) % 4)
    yield data + bytes(-len(data) % 4)


def _module_name(path: str) -> str:
    return Path(path).name.partition(".")[0].replace("-", "_")
