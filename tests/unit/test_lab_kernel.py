"""Kernel packages: how they are named, and what is taken out of them."""

import io
import shutil
import tarfile

import pytest

from ovr.errors import LabError
from ovr.lab import kernel
from ovr.lab.kernel import KernelPackage, guest_kernel, write_kernel

DEP = """\
kernel/virtio_pci.ko:
kernel/virtio_blk.ko:
kernel/virtio_rng.ko:
kernel/virtio_console.ko:
kernel/virtiofs.ko:
kernel/vmw_vsock_virtio_transport.ko: kernel/vsock.ko
kernel/vsock.ko:
"""


def test_names():
    plain = KernelPackage.parse("linux-image-rt-amd64", "bookworm")
    assert (plain.name, plain.release, plain.base) == (
        "linux-image-rt-amd64", "bookworm", "bookworm",
    )  # fmt: skip
    for release, base in (
        ("trixie-backports", "trixie"),
        ("bullseye-security", "bullseye"),
        ("sid", "sid"),
        ("experimental", "sid"),
    ):
        named = KernelPackage.parse(f"linux-image-7.0.4+deb13-amd64/{release}", "bookworm")
        assert (named.release, named.base) == (release, base)


@pytest.mark.parametrize(
    "text", ["", "/", "linux-image/", "a,b", "-o/sid", "linux image", "k/sid main", "k/a/b", "k/$x"]
)
def test_what_is_no_name(text):
    with pytest.raises(LabError, match="is not"):
        KernelPackage.parse(text, "trixie")


def archive(path, *names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))


@pytest.mark.parametrize(
    ("vmlinuz", "modules"),
    [
        ("./boot/vmlinuz-6.1.0-57-rt-amd64", "./lib/modules/6.1.0-57-rt-amd64/"),
        ("./usr/lib/modules/7.3.4/vmlinuz", "./usr/lib/modules/7.3.4/"),
    ],
)
def test_both_layouts_of_packages(tmp_path, vmlinuz, modules):
    archive(tmp_path / "tar", vmlinuz, modules + "kernel/a.ko", "./usr/share/lib/modules/x/b.ko")
    package = KernelPackage("one", "trixie")
    data, version = kernel._unpack(tmp_path / "tar", tmp_path / "tree", package)
    assert data == vmlinuz.encode()
    assert version == modules.split("/")[-2]
    files = [path for path in (tmp_path / "tree").rglob("*") if path.is_file()]
    assert files == [tmp_path / "tree" / "lib" / "modules" / version / "kernel" / "a.ko"]


def test_a_kernel_whose_modules_are_gone(tmp_path):
    """As with Linux 6.19 to 7.1 of trixie-backports, when newer ones are there."""
    archive(tmp_path / "tar", "./boot/vmlinuz-7.0", "./usr/lib/modules/7.0/modules.builtin")
    package = KernelPackage("linux-image-7.0", "trixie-backports")
    with pytest.raises(LabError, match=r"kernel of linux-image-7.0, but not its modules"):
        kernel._unpack(tmp_path / "tar", tmp_path / "tree", package)


@pytest.mark.parametrize("names", [[], ["./boot/vmlinuz-1", "./boot/vmlinuz-2"]])
def test_not_one_kernel(tmp_path, names):
    archive(tmp_path / "tar", "./bin/bash", *names)
    package = KernelPackage("bash", "trixie")
    with pytest.raises(LabError, match=f"bash brings {len(names)} kernels") as caught:
        kernel._unpack(tmp_path / "tar", tmp_path / "tree", package)
    assert "linux-image-amd64" in caught.value.hint


def test_modules_to_load_first(tmp_path):
    files = {"modules.dep": DEP, "modules.builtin": "kernel/fs/ext4/ext4.ko\n"}
    write_kernel(tmp_path, b"K", lambda name: files.get(name, name).encode())
    assert (tmp_path / "vmlinuz").read_bytes() == b"K"
    found = [path.read_text() for path in sorted((tmp_path / "modules").iterdir())]
    assert found[0] == "kernel/virtio_pci.ko"
    assert found[-2:] == ["kernel/vsock.ko", "kernel/vmw_vsock_virtio_transport.ko"]


def test_a_package_that_there_is_not(tmp_path, monkeypatch):
    """The first cause, and where else to look; real builds are tested with VMs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel, "need_tool", lambda program, package: program)

    def fail(*_, **__):
        raise LabError("mmdebstrap failed: E: Unable to locate package linux-none")

    monkeypatch.setattr(kernel, "mmdebstrap", fail)
    with pytest.raises(LabError, match=r"Debian sid: .* Unable to locate") as one:
        guest_kernel(KernelPackage("linux-none", "sid"))
    assert "PACKAGE/RELEASE" in one.value.hint


@pytest.mark.skipif(not shutil.which("mke2fs", path="/sbin:/usr/sbin"), reason="no mke2fs here")
def test_a_disk_of_modules(tmp_path):
    (tmp_path / "modules" / "7.0").mkdir(parents=True)
    (tmp_path / "modules" / "7.0" / "one.ko").write_bytes(b"x")
    kernel._make_disk(tmp_path / "modules", tmp_path / "disk")
    with (tmp_path / "disk").open("rb") as disk:
        disk.seek(1024 + 56)
        assert disk.read(2) == b"\x53\xef"  # ext4's magic number
