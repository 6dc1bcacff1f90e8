"""The lab guest's initramfs: our init, our agent, and the kernel modules that reach the disk.

A cpio archive in the kernel's newc form (Documentation/driver-api/early-userspace/buffer-format).
"""

import lzma
import stat
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ovr.errors import LabError

__all__ = ["Modules", "cpio", "initramfs", "unpacked_module"]


@dataclass(frozen=True)
class Modules:
    """A kernel's description of its modules: depmod's files, see modules.dep(5).

    Attributes:
        dep: the text of ``modules.dep``; its dependencies come in reverse load order.
        builtin: the text of ``modules.builtin``: modules that are built into the kernel.
        softdep: the text of ``modules.softdep``: dependencies without a shared symbol.
        alias: the text of ``modules.alias``.
    """

    dep: str
    builtin: str
    softdep: str = ""
    alias: str = ""

    def plan(self, wanted: Sequence[str]) -> list[str]:
        """Return the module files to load, in order, each once and after its dependencies.

        Args:
            wanted: module names as in their file names, such as ``virtio_blk``.

        Raises:
            LabError: the kernel has no such module.
        """
        needs: dict[str, list[str]] = {}
        for line in self.dep.splitlines():
            path, _, before = line.partition(":")
            needs[_module_name(path)] = [*reversed(before.split()), path]
        present = {_module_name(path) for path in self.builtin.splitlines()}
        before_it = self._soft(needs)
        order: dict[str, None] = {}
        asked: set[str] = set()

        def add(name: str) -> None:
            asked.add(name)
            for path in needs[name]:
                for other in before_it.get(_module_name(path), ()):
                    if other not in asked:
                        add(other)
                order[path] = None

        for name in wanted:
            if name in present:
                continue
            if name not in needs:
                raise LabError(f"the guest's kernel has no module {name}")
            add(name)
        return list(order)

    def _soft(self, known: Container[str]) -> dict[str, list[str]]:
        # By module: those to load first, without a shared symbol. ext4 of Linux 6.1 takes its
        # checksums from a provider of "crc32c", which the kernel does not find without a modprobe.
        aliases: dict[str, list[str]] = {}
        for line in self.alias.splitlines():
            match line.split():
                case ["alias", name, module]:
                    aliases.setdefault(name, []).append(module)
        found: dict[str, list[str]] = {}
        for line in self.softdep.splitlines():
            _, _, text = line.partition("softdep ")
            module, _, before = text.partition(" pre: ")
            for name in before.partition(" post:")[0].split():
                modules = [_module_name(name), *aliases.get(name, ())]
                found.setdefault(_module_name(module), []).extend(
                    one for one in modules if one in known
                )
        return found


def unpacked_module(path: str, data: bytes) -> bytes:
    """Return a module's ELF file, unpacked.

    Raises:
        LabError: it is packed in an unknown format.
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
