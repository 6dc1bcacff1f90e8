"""Modules in load order; an archive that another program reads; our init itself."""

import gzip
import lzma
import stat
import subprocess

import pytest

from ovr.errors import LabError
from ovr.lab import image
from ovr.lab.initramfs import Modules, cpio, initramfs, unpacked_module

# Lines as depmod writes them: what a module needs, in reverse load order.
DEP = """\
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko.xz: \
kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/block/virtio_blk.ko: \
kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
"""


def plan(modules, wanted):
    return [path.rpartition("/")[2] for path in modules.plan(wanted)]


def test_module_plan():
    modules = Modules(DEP, "kernel/fs/ext4/ext4.ko\n")
    assert plan(modules, ["virtio_blk", "ext4", "virtio_rng"]) == [
        "virtio_ring.ko", "virtio.ko", "virtio_blk.ko", "virtio-rng.ko.xz",
    ]  # fmt: skip
    with pytest.raises(LabError, match="no module nvme"):
        modules.plan(["nvme"])


def test_what_no_symbol_shows_is_loaded_before():
    """As of Linux 6.1, where nothing in the initramfs answers the kernel's own request for it."""
    dep = """\
kernel/fs/ext4/ext4.ko: kernel/lib/libcrc32c.ko
kernel/lib/libcrc32c.ko:
kernel/crypto/crc32c_generic.ko: kernel/crypto/base.ko
kernel/arch/x86/crypto/crc32c-intel.ko:
kernel/crypto/base.ko:
"""
    softdep = """\
# Soft dependencies extracted from modules themselves.
softdep libcrc32c pre: crc32c
softdep ext4 pre: base missing post: unwanted
softdep crc32c_generic pre: ext4
"""
    alias = "alias crc32c crc32c_generic\nalias crc32c crc32c_intel\nalias fs-ext4 ext4\n"
    assert plan(Modules(dep, "", softdep, alias), ["ext4"]) == [
        "base.ko", "crc32c_generic.ko", "crc32c-intel.ko", "libcrc32c.ko", "ext4.ko",
    ]  # fmt: skip


def test_unpacked_module():
    data = b"\x7fELF" + bytes(100)
    assert unpacked_module("a.ko", data) == data
    assert unpacked_module("a.ko.xz", lzma.compress(data)) == data
    assert unpacked_module("a.ko.gz", gzip.compress(data)) == data
    with pytest.raises(LabError, match="packed"):
        unpacked_module("a.ko.lz4", data)


def entries(archive):
    """Read newc by its fields."""
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        at += -(-(110 + name_size) // 4) * 4
        if name == "TRAILER!!!":
            return
        yield name, mode, archive[at : at + size]
        at += -(-size // 4) * 4


def test_cpio():
    files = {"init": b"i", "a/b/c": b"12345", "a/d": b""}
    found = {name: (mode, data) for name, mode, data in entries(cpio(files))}
    assert list(found) == ["a", "a/b", "init", "a/b/c", "a/d"]
    assert all(stat.S_ISDIR(found[name][0]) for name in ("a", "a/b"))
    assert {name: found[name][1] for name in files} == files
    assert all(found[name][0] == stat.S_IFREG | 0o755 for name in files)


def test_modules_are_numbered_in_load_order():
    names = [name for name, _, _ in entries(initramfs(b"", b"", [b"m"] * 12))]
    assert names == ["modules", "init", "ovr-agent", *(f"modules/{n:02}.ko" for n in range(12))]


def test_init_builds_and_refuses_to_be_anything_but_pid_1(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = tmp_path / "init"
    program.write_bytes(image._init_program())
    program.chmod(0o755)
    done = subprocess.run([program], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 2
    assert "PID 1" in done.stderr


def test_unknown_suite():
    with pytest.raises(LabError, match="no suite sarge") as caught:
        image.guest_image("sarge")
    assert "trixie" in caught.value.hint
