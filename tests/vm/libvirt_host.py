"""A libvirtd of our own: it sees no configuration, state or user of the host's, and leaves none.

It runs in a mount namespace, where its directories are fresh and where the user that Debian's
libvirt insists on exists.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ovr.guest import build
from ovr.lab.image import guest_image
from ovr.lab.process import await_socket, last_line, spawn
from tests.documents import block, said

WHY_NOT = (
    "needs root" if os.geteuid() else
    "" if shutil.which("libvirtd") and shutil.which("virsh") else
    "needs libvirtd: apt-get install libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients"
)  # fmt: skip
"""Why the tests with libvirt cannot run here; empty if they can."""

QEMU_CONF = """\
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""
LIBVIRTD_CONF = """\
unix_sock_dir = "{directory}"
auth_unix_ro = "none"
auth_unix_rw = "none"
"""
START = """\
set -e
for place in /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /run/libvirt; do
    mkdir -p $place
    mount -t tmpfs ovr-test $place
done
for file in passwd group; do
    { cat /etc/$file; cat $1/$file; } > $1/etc-$file
    mount --bind $1/etc-$file /etc/$file
done
cp $1/qemu.conf /etc/libvirt
exec libvirtd --config $1/libvirtd.conf --pid-file $1/libvirtd.pid
"""
MEMORY_BACKING = block("docs/libvirt.md", "<memoryBacking>")
VSOCK = block("docs/libvirt.md", "<vsock ")
CHANNEL = block("docs/libvirt.md", "<channel ")
DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>1024</memory>
  <vcpu>2</vcpu>
  {memory_backing}
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{directory}/initramfs</initrd>
    <cmdline>console=ttyS0 oops=panic panic=-1 tsc=nowatchdog</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'>
    <feature policy='disable' name='erms'/>
    <feature policy='disable' name='fsrm'/>
    <feature policy='disable' name='cx16'/>
  </cpu>
  <on_reboot>destroy</on_reboot>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{directory}/disk'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <serial type='file'><source path='{directory}/console'/><target port='0'/></serial>
    {agent}
    <memballoon model='none'/>
  </devices>
</domain>
"""


@contextmanager
def libvirtd(directory: Path) -> Iterator[str]:
    """Run libvirtd for the body of the ``with``; gives the URI at which it is reached."""
    (directory / "qemu.conf").write_text(QEMU_CONF)
    (directory / "libvirtd.conf").write_text(LIBVIRTD_CONF.format(directory=directory))
    (directory / "passwd").write_text("libvirt-qemu:x:64055:64055::/:/bin/false\n")
    (directory / "group").write_text("libvirt-qemu:x:64055:\n")
    log, socket = directory / "libvirtd.log", directory / "libvirt-sock"
    command = ["unshare", "--mount", "/bin/sh", "-c", START, "sh", str(directory)]
    daemon = spawn([shutil.which("unshare"), *command[1:]], log)
    try:
        await_socket(socket, daemon, log, patience=60)
        yield f"qemu:///system?socket={socket}"
    finally:
        daemon.end()


@contextmanager
def domain(uri: str, name: str, directory: Path) -> Iterator[str]:
    """Boot a trixie guest as a libvirt domain; gives the address of its agent."""
    image = guest_image("trixie")
    (directory / "initramfs").write_bytes(image.initramfs(build(lab=True)))
    # A copy with holes: libvirt locks what its domains write to, and others boot from the image.
    subprocess.run(["cp", "--sparse=always", image.disk, directory / "disk"], check=True)
    channel = said(CHANNEL, {"/run/DOMAIN.ovr": str(directory / "agent")})
    (directory / "domain.xml").write_text(domain_xml(name, directory, channel))
    virsh(uri, "create", str(directory / "domain.xml"))
    try:
        await_ready(directory / "console")
        yield f"serial:{directory / 'agent'}"
    finally:
        virsh(uri, "destroy", name)
        (directory / "disk").unlink()


def domain_xml(name: str, directory: Path, agent: str) -> str:
    """Return the XML of a domain, with what docs/libvirt.md wants it to have.

    Args:
        name: of the domain.
        directory: has its disk and its initramfs, and gets its console.
        agent: a device that leads to the guest's agent.
    """
    return DOMAIN.format(
        name=name, kernel=guest_image("trixie").kernel.vmlinuz, directory=directory,
        memory_backing=MEMORY_BACKING, agent=agent,
    )  # fmt: skip


def virsh(uri: str, *words: str) -> str:
    done = subprocess.run(["virsh", "-c", uri, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def await_ready(console: Path, patience: float = 180.0) -> None:
    deadline = time.monotonic() + patience
    while "ovr-agent: ready" not in (console.read_text("latin-1") if console.exists() else ""):
        assert time.monotonic() < deadline, last_line(console, 3)
        time.sleep(0.2)
