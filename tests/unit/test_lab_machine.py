"""Properties of lab VMs that need no boot."""

import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from ovr import lab
from ovr.errors import LabError, UsageError, VmUnreachable
from ovr.lab import accel, boot, ram, share, vsock
from ovr.lab.accel import choose, cpu_model
from ovr.lab.boot import GuestDied, _launch
from ovr.lab.image import GuestImage
from ovr.lab.kernel import GuestKernel
from ovr.lab.machine import claimed
from ovr.lab.process import spawn
from ovr.lab.qemu import Hardware, boot_arguments, machine_arguments, service_arguments
from ovr.lab.ram import memory_size
from ovr.memory.addresses import Gpa
from ovr.memory.ram import GuestRam
from ovr.vm.blockers import blockers
from ovr.vm.find import LAB_STATE, find_vm, lab_directory
from ovr.vm.memory_map import guest_slots
from ovr.vm.qmp import ExecuteError, Qmp

GIB = 1 << 30


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def vm(tmp_path):
    """A VM whose QEMU is a sleeping process."""
    directory = lab_directory("one")
    (directory / "ram").mkdir(parents=True)
    (directory / "ram" / "node0").touch()
    vm = lab.LabVm(
        "one", "trixie", Hardware(GIB, 2, "tcg", None, 1), directory / "qmp",
        f"unix:{directory}/vsock:687", f"serial:{directory}/serial", directory / "console.log",
        (directory / "ram" / "node0",),
    )  # fmt: skip
    vm.processes["vsock"] = spawn(["/bin/sleep", "60"], directory / "log")
    vm.processes["qemu"] = spawn(["/bin/sleep", "60"], directory / "log")
    vm.save()
    yield vm
    vm.down()


def test_state_file_gives_the_same_vm(vm):
    assert lab.get("one") == vm
    assert lab.ls() == [vm]
    assert vm.alive
    assert vm.pid == vm.processes["qemu"].pid


def test_find_vm_reads_the_state_file(vm):
    found = find_vm("lab:one")
    assert (found.spec, found.qmp, found.agent) == ("lab:one", vm.qmp, vm.agent)


def test_down_leaves_nothing(vm):
    vm.down()
    assert not vm.alive
    assert not lab_directory("one").exists()
    assert lab.ls() == []
    with pytest.raises(LabError, match="no lab VM one"):
        lab.get("one")
    with pytest.raises(VmUnreachable, match="no lab VM one"):
        find_vm("lab:one")
    vm.down()


def test_a_dead_vm_is_listed_and_its_name_is_free(vm):
    vm.processes["qemu"].end()
    assert [one.alive for one in lab.ls()] == [False]
    with claimed("one") as directory:
        assert list(directory.iterdir()) == []
    assert not vm.processes["vsock"].alive


def test_a_running_vms_name_is_taken(vm):
    with pytest.raises(LabError, match="runs already") as caught, claimed("one"):
        pass
    assert caught.value.hint == "ovr lab down one"
    assert vm.alive


def test_a_claim_that_fails_leaves_nothing():
    with pytest.raises(ZeroDivisionError), claimed("two"):
        raise ZeroDivisionError
    assert not lab_directory("two").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": "one"}', "\xff"])
def test_damaged_state_file(text):
    directory = lab_directory("bad")
    directory.mkdir(parents=True)
    (directory / LAB_STATE).write_text(text, "latin-1")
    with pytest.raises(LabError, match="damaged"):
        lab.get("bad")
    with pytest.raises(VmUnreachable):
        find_vm("lab:bad")


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "x" * 33, "a,b", "ü"])
def test_names_that_no_vm_can_have(name):
    with pytest.raises(UsageError):
        lab_directory(name)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4G", 4 * GIB),
        ("1536M", 3 * GIB // 2),
        ("1GiB", GIB),
        (GIB, GIB),
        ("2048k", 2 << 20),
        ("1058824K", 1058824 << 10),
    ],
)
def test_memory_size(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "4", "1.5G", "-4G", "0", "4 apples", "1001K", "9" * 30 + "X"])
def test_not_a_memory_size(text):
    with pytest.raises(LabError):
        memory_size(text)
    with pytest.raises(LabError, match="multiple of 24K"):
        memory_size("1G", 3)
    with pytest.raises(LabError, match="multiple of 4M"):
        memory_size("1026M", 2, "hugetlbfs")
    assert memory_size("1026M", 1, "hugetlbfs") == 1026 << 20


def test_memory_that_the_host_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr(ram, "_mount", lambda place, kind, options: False)
    place = ram._places(tmp_path)[1]
    with pytest.raises(LabError, match="do not fit"):
        ram.make_ram(tmp_path, 1 << 50, 1)
    assert not place.exists()
    files = ram.make_ram(tmp_path, 1 << 21, 2)
    assert [file.parent for file in files] == [place, place]
    files[0].touch()
    ram.drop_ram(tmp_path)
    assert not place.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_ram_on_huge_pages(tmp_path):
    (file,) = ram.make_ram(tmp_path, 4 << 20, 1)
    if not file.parent.is_mount():
        pytest.skip("this root may not mount")
    assert "huge=always" in Path("/proc/mounts").read_text().split(str(file.parent))[1][:80]
    file.write_bytes(bytes(4 << 20))
    with file.open("rb"):  # somebody still uses it
        ram.drop_ram(tmp_path)
        assert not file.parent.exists()
        assert str(file.parent) not in Path("/proc/mounts").read_text()


def test_memfds_have_no_paths(tmp_path):
    assert ram.make_ram(tmp_path, 1 << 21, 2, "memfd") == ()
    with pytest.raises(LabError, match="do not fit"):
        ram.make_ram(tmp_path, 1 << 50, 2, "memfd")


@pytest.mark.parametrize(
    ("counts", "hint"), [((10, 0, 10), "nr_hugepages=512"), ((600, 100, 700), "nr_hugepages=712")]
)
def test_huge_pages_that_the_host_does_not_have(tmp_path, monkeypatch, counts, hint):
    monkeypatch.setattr(ram, "_POOL", tmp_path)
    monkeypatch.setattr(ram.os, "geteuid", lambda: 0)
    for name, count in zip(("free", "resv", "nr"), counts, strict=True):
        (tmp_path / f"{name}_hugepages").write_text(f"{count}\n")
    free = counts[0] - counts[1]
    with pytest.raises(LabError, match=f"512 huge pages are needed, and {free} are") as caught:
        ram.make_ram(tmp_path, 1 << 30, 1, "hugetlbfs")
    assert hint in caught.value.hint


def test_huge_pages_are_mounted_by_root_only(tmp_path, monkeypatch):
    monkeypatch.setattr(ram.os, "geteuid", lambda: 1000)
    with pytest.raises(LabError, match="only root"):
        ram.make_ram(tmp_path, 1 << 30, 1, "hugetlbfs")


def option(arguments, name):
    return [value for key, value in pairwise(arguments) if key == name]


def test_command_line_of_two_nodes(tmp_path):
    hardware = Hardware(4 * GIB, 3, "tcg", False, 2)
    arguments = machine_arguments(hardware, [tmp_path / "a", tmp_path / "b"])
    assert option(arguments, "-accel") == ["tcg,thread=multi,tb-size=256"]
    assert option(arguments, "-cpu") == ["max,-erms,-fsrm,-cx16,la57=off"]
    assert option(arguments, "-m") == [f"size={4 * GIB}B"]
    assert option(arguments, "-machine") == ["q35"]
    assert option(arguments, "-numa") == ["node,nodeid=0,memdev=ram0", "node,nodeid=1,memdev=ram1"]
    for number, name in enumerate("ab"):
        (text,) = [
            one for one in option(arguments, "-object") if f"mem-path={tmp_path}/{name}" in one
        ]
        assert f"id=ram{number},size={2 * GIB}B" in text
        assert "share=on,prealloc=on" in text


def test_command_line_of_memfds(tmp_path):
    arguments = machine_arguments(Hardware(GIB, 1, "tcg", None, 2, "memfd"), [])
    backends = option(arguments, "-object")
    assert [text.partition(",")[0] for text in backends] == ["memory-backend-memfd"] * 2
    assert all("share=on" in text and f"size={GIB // 2}B" in text for text in backends)


def test_command_line_of_another_kernel(tmp_path):
    """Its modules are a disk of their own, which init is told of."""
    own = GuestImage("trixie", Path("d"), GuestKernel(Path("k"), Path("m"), None))
    other = GuestImage("trixie", Path("d"), GuestKernel(Path("k"), Path("m"), Path("more")))
    usual = boot_arguments(own, Path("i"), "one", "stdio")
    assert "module_disk" not in " ".join(usual)
    words = boot_arguments(other, Path("i"), "one", "stdio", "nokaslr quiet")
    [line] = option(words, "-append")
    assert line.endswith(" module_disk=/dev/vdb nokaslr quiet")
    drives = option(words, "-drive")
    assert [("file=d" in drive, "readonly=on" in drive) for drive in drives] == [
        (True, False), (False, True),
    ]  # fmt: skip
    assert [one for one in option(words, "-device") if "blk" in one] == [
        "virtio-blk-pci,drive=disk", "virtio-blk-pci,drive=modules",
    ]  # fmt: skip


def bare_kernel():
    """As much of a bzImage as QEMU looks at (Documentation/arch/x86/boot.rst)."""
    image = bytearray(1 << 20)
    for at, size, value in (
        (0x1F1, 1, 4),  # setup_sects
        (0x1FE, 2, 0xAA55),
        (0x202, 4, int.from_bytes(b"HdrS", "little")),
        (0x206, 2, 0x20C),  # protocol version
        (0x211, 1, 1),  # loaded high
        (0x214, 4, 0x100000),
        (0x22C, 4, 0x7FFFFFFF),  # highest address for the initramfs
    ):
        image[at : at + size] = value.to_bytes(size, "little")
    return bytes(image)


@pytest.fixture
def standing_vm(tmp_path):
    """Real QEMU with the lab's command line and two NUMA nodes, before its first instruction."""
    (tmp_path / "kernel").write_bytes(bare_kernel())
    (tmp_path / "initramfs").write_bytes(bytes(4096))
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    kernel = GuestKernel(tmp_path / "kernel", tmp_path, tmp_path / "disk")
    image = GuestImage("trixie", tmp_path / "disk", kernel)
    command = [
        *machine_arguments(
            Hardware(128 << 20, 2, "tcg", True, 2), [tmp_path / "a", tmp_path / "b"]
        ),
        *boot_arguments(image, tmp_path / "initramfs", "one", f"file,path={tmp_path}/console"),
        *service_arguments(tmp_path),
        "-S",
    ]
    process = _launch(command, tmp_path)
    yield tmp_path, process
    process.end()
    assert not process.alive


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no QEMU here")
def test_real_qemu_takes_the_command_line_and_tells_its_memory(standing_vm):
    directory, process = standing_vm
    address = find_vm(f"pid:{process.pid}")
    assert address.qmp == directory / "qmp"
    with Qmp.connect(address.qmp) as qmp:
        assert qmp.qemu_pid == process.pid
        assert qmp.status() == "prelaunch"
        assert [str(reason) for reason in blockers(qmp)]
        slots = guest_slots(qmp)
        with pytest.raises(ExecuteError):
            qmp.execute("no-such-command")
    assert {slot.file.name for slot in slots} == {str(directory / "a"), str(directory / "b")}
    assert slots[-1].end == 128 << 20
    with GuestRam(slots, writable=True, unheld=True) as guest:
        guest.write(Gpa(100 << 20), b"second node")
    assert (directory / "b").read_bytes()[36 << 20 :].startswith(b"second node")


@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="no QEMU here")
def test_real_qemu_says_why_it_does_not_start(tmp_path):
    with pytest.raises(LabError, match="machine type"):
        _launch(["qemu-system-x86_64", "-machine", "nosuchmachine"], tmp_path)


@pytest.fixture
def boots(monkeypatch, vm):
    """Boots that end as the test says; nothing is built."""
    outcomes = []

    def one(*_, **__):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    image = GuestImage("trixie", Path(), GuestKernel(Path(), Path(), None))
    monkeypatch.setattr(boot, "guest_image", lambda suite, packages, kernel: image)
    monkeypatch.setattr(GuestImage, "initramfs", lambda self, agent: b"")
    monkeypatch.setattr(boot, "build_agent", lambda lab: Path())
    monkeypatch.setattr(boot, "_boot", one)
    return outcomes


def test_a_guest_that_dies_under_tcg_gets_another_try(boots, vm, caplog):
    boots += [GuestDied("oops"), GuestDied("oops"), vm]
    assert lab.up("two", accel="tcg") is vm
    assert caplog.text.count("trying again") == 2
    boots += [GuestDied("one"), GuestDied("two"), GuestDied("three")]
    with pytest.raises(GuestDied, match="three"):
        lab.up("two", accel="tcg")


def test_no_other_failure_is_tried_again(boots, vm, monkeypatch):
    boots += [LabError("does not come up"), vm]
    with pytest.raises(LabError, match="does not come up"):
        lab.up("two", accel="tcg")
    boots[:] = [GuestDied("oops"), vm]
    monkeypatch.setattr(boot, "choose", lambda accel, trial: "kvm")
    with pytest.raises(GuestDied):
        lab.up("two", accel="kvm")


def test_tcg_by_name_never_tries_kvm():
    assert choose("tcg", lambda: pytest.fail("tried")) == "tcg"


def test_auto_tries_kvm_once(monkeypatch):
    monkeypatch.setattr(accel.os, "access", lambda path, mode: True)
    asked = []

    def boots():
        asked.append(1)
        return True

    assert [choose("auto", boots), choose("auto", boots)] == ["kvm", "kvm"]
    assert len(asked) == 1
    monkeypatch.setattr(accel.platform, "release", lambda: "another kernel")
    assert choose("auto", lambda: False) == "tcg"
    assert choose("auto", boots) == "tcg"
    assert choose("kvm", lambda: pytest.fail("tried")) == "kvm"


def test_kvm_that_the_host_does_not_have(monkeypatch):
    monkeypatch.setattr(accel.os, "access", lambda path, mode: False)
    assert choose("auto", lambda: pytest.fail("tried")) == "tcg"
    with pytest.raises(LabError, match="/dev/kvm") as caught:
        choose("kvm", lambda: True)
    assert "tcg" in caught.value.hint


def test_cpu_model():
    assert cpu_model("kvm", None) == "host"
    assert cpu_model("kvm", False) == "host,la57=off"
    assert cpu_model("tcg", None) == "max,-erms,-fsrm,-cx16"
    assert cpu_model("tcg", True).endswith(",la57=on")
    if "la57" not in Path("/proc/cpuinfo").read_text():
        with pytest.raises(LabError, match="5-level"):
            cpu_model("kvm", True)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ("--shared-dir <SHARED_DIR>  Shared directory path", ["--shared-dir=/data"]),
        ("-o source=PATH  shared directory tree", ["-o", "source=/data"]),
    ],
)
def test_both_kinds_of_virtiofsd(tmp_path, usage, expected):
    program = tmp_path / "virtiofsd"
    program.write_text(f"#!/bin/sh\necho '{usage}'\n")
    program.chmod(0o755)
    command = share._command(str(program), Path("/data"), Path("/socket"))
    assert command[:2] == [str(program), "--socket-path=/socket"]
    assert command[2 : 2 + len(expected)] == expected


def test_vsock_of_the_hosts_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(vsock, "_host_has_vsock", lambda: True)
    device = vsock.add_vsock(tmp_path)
    cid = device.arguments[1].removeprefix("vhost-vsock-pci,guest-cid=")
    assert int(cid) > 2
    assert (device.address, device.daemon) == (f"vsock:{cid}:687", None)


def test_vsock_daemon(tmp_path, monkeypatch):
    program = tmp_path / "vhost-device-vsock"
    program.write_text(
        f"#!{sys.executable}\n"
        + """if True:
        import socket, sys, time
        options = dict(part.split("=") for part in sys.argv[2].split(","))
        assert sys.argv[1] == "--vm" and int(options["guest-cid"]) > 2 and options["uds-path"]
        if "bad" in options["socket"]:
            sys.exit("no such thing")
        socket.socket(socket.AF_UNIX).bind(options["socket"])
        time.sleep(60)
    """
    )
    program.chmod(0o755)
    monkeypatch.setattr(vsock, "_host_has_vsock", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    device = vsock.add_vsock(tmp_path)
    assert device.daemon and device.daemon.alive
    device.daemon.end()
    assert device.address == f"unix:{tmp_path}/vsock:687"
    assert f"socket,id=vsock,path={tmp_path}/vsock.vhost" in device.arguments
    (tmp_path / "bad").mkdir()
    with pytest.raises(LabError, match="died: no such thing"):
        vsock.add_vsock(tmp_path / "bad")


def test_share_of_what_is_no_directory(tmp_path):
    with pytest.raises(LabError, match="not a directory"):
        share.add_share(tmp_path / "none", tmp_path)


def test_state_file_is_plain_json(vm):
    state = json.loads((lab_directory("one") / LAB_STATE).read_bytes())
    assert state["hardware"]["memory"] == GIB
    assert state["processes"]["qemu"]["pid"] == vm.pid
