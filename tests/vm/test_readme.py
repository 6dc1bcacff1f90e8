"""The README's commands and its Python: the wheel, in an empty environment, and a VM as it says.

The guest is the lab's: its kernel and init boot from the README's drive.
"""

import os
import shlex
from pathlib import Path

import pytest

from ovr import lab
from ovr.guest import build
from ovr.lab import demo
from ovr.lab.accel import cpu_model
from ovr.lab.image import guest_image
from ovr.lab.process import spawn
from ovr.lab.qemu import Hardware
from tests.documents import block, run, said
from tests.vm.conftest import PREFIX, end_workload, whole
from tests.vm.libvirt_host import await_ready

QMP, AGENT = "/run/vm/qmp.sock", "vsock:3"
STARTS = block("README.md", "qemu-system-x86_64")
USES = block("README.md", "python -m ovr list")
PYTHON = block("README.md", "import ovr")


def command_of(directory: Path, ram: Path) -> str:
    """The README's QEMU, where there is no KVM, no vhost-vsock, and a kernel without a loader."""
    image = guest_image("trixie")
    (directory / "initramfs").write_bytes(image.initramfs(build(lab=True)))
    port = (
        f"-device virtio-serial -chardev socket,id=ovr,path={directory}/agent,server=on,wait=off"
        " -device virtserialport,chardev=ovr,name=org.ovr.0"
    )
    command = said(STARTS, {
        "-accel kvm -cpu host": f"-accel tcg -cpu {cpu_model('tcg', None)}",
        "4G": "1G",
        "file=vm.img,": f"file={image.disk},snapshot=on,",
        "/dev/shm/vm": str(ram),
        QMP: f"{directory}/qmp",
        "-device vhost-vsock-pci,guest-cid=3": port,
    })  # fmt: skip
    boot = [
        "-kernel", image.kernel.vmlinuz, "-initrd", directory / "initramfs",
        "-append", "console=ttyS0 oops=panic panic=-1 tsc=nowatchdog",
        "-serial", f"file:{directory}/console", "-display", "none", "-no-reboot",
    ]  # fmt: skip
    return f"exec {command.rstrip()} {shlex.join(map(str, boot))}"


@pytest.fixture
def dump(dumps):
    return dumps["trixie"]


@pytest.fixture
def vm(dump, tmp_path):
    """The VM; as a lab VM, to run commands in it."""
    ram = Path(f"/dev/shm/{PREFIX}readme")
    process = spawn(["/bin/bash", "-c", command_of(tmp_path, ram)], tmp_path / "log")
    try:
        await_ready(tmp_path / "console")
        agent = f"serial:{tmp_path / 'agent'}"
        hardware = Hardware(1 << 30, 1, "tcg", None, 1)
        yield lab.LabVm(
            f"{PREFIX}readme", "trixie", hardware, tmp_path / "qmp", agent, agent,
            tmp_path / "console", (ram,), {"qemu": process},
        )  # fmt: skip
    finally:
        process.end()
        ram.unlink(missing_ok=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="writes to a VM's RAM")
def test_commands_and_python(dump, vm, installed, tmp_path):
    (tmp_path / "images").symlink_to(dump.path)
    demo.prepare(vm)
    ours = {QMP: str(vm.qmp), AGENT: vm.agent}

    uses = said(USES, {**ours, "4242": str(dump.pid)})
    printed = run(uses, tmp_path, programs=installed)
    assert f"qmp:{vm.qmp}" in printed or f"pid:{vm.pid}" in printed
    assert "Looks good." in printed
    assert f"restored pid {dump.pid} " in printed
    assert " MiB are ready" in printed
    assert "ovr-workload" in printed
    assert f"dumped pid {dump.pid}, which runs on" in printed
    assert (tmp_path / "saved" / "inventory.img").exists()
    whole(vm, dump)
    end_workload(vm)

    program = said(PYTHON, ours) + "print(report.skeleton, report.pid)\n"
    printed = run(f"python -c {shlex.quote(program)}", tmp_path, programs=installed)
    assert printed == f"warm {dump.pid}\n"  # "memory ready for the next restore"
    whole(vm, dump)
