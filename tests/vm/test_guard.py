"""Restores while something happens to the VM, the tree or the images."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest

import ovr
from ovr.attempt import settings
from ovr.attempt.copier import Copier
from ovr.errors import AgentUnreachable, AttemptFailed, ImagesDamaged, Unreachable, VerifyMismatch
from ovr.lab.demo import prepare
from ovr.memory.addresses import Gva
from ovr.memory.ram import GuestRam
from ovr.vm.lock import locked
from tests.vm import states_lab as states
from tests.vm.conftest import EVERYTHING, alive, end_workload
from tests.vm.test_failures import refused, unharmed


@pytest.fixture(params=("trixie",))
def suite(request):
    """The kernel matters to none of this."""
    return request.param


@pytest.fixture
def writes(monkeypatch):
    """Every write of this process to guest memory."""
    seen = []
    for name in ("write", "copy_in", "copy_from"):
        original = getattr(GuestRam, name)

        def noted(ram, *arguments, original=original, **how):
            seen.append(arguments)
            return original(ram, *arguments, **how)

        monkeypatch.setattr(GuestRam, name, noted)
    return seen


def between_copies(monkeypatch, happens):
    """Copy little at a time, and let something happen after the first copy, the VM running."""
    monkeypatch.setattr("ovr.attempt.in_holds.HOLD_BYTES", 16 << 20)
    original = Copier._prepare
    calls = []

    def prepare(copier, batch, **how):
        ready = original(copier, batch, **how)
        calls.append(batch)
        if len(calls) == 2:
            happens()
        return ready

    monkeypatch.setattr(Copier, "_prepare", prepare)


def test_a_tree_that_dies_in_the_middle(vm, dump, writes, monkeypatch):
    """Its page table goes to the next process; nothing is written to that one."""

    def happens():
        vm.sh(f"kill -9 {dump.pid}; while test -d /proc/{dump.pid}/fd/0; do sleep 0.1; done;"
              " for i in $(seq 50); do /bin/true; done")  # fmt: skip
        writes.clear()

    between_copies(monkeypatch, happens)
    with ovr.attach(f"lab:{vm.name}") as attached, pytest.raises(ovr.OvrError) as caught:
        attached.restore(dump.path)
    assert f"pid {dump.pid} has died" in str(caught.value)
    assert writes == []
    monkeypatch.undo()
    unharmed(vm, dump)


def test_two_at_once(vm, dump):
    command = [sys.executable, "-m", "ovr", "restore", "-D", dump.path, "--vm", f"lab:{vm.name}"]
    with ovr.attach(f"lab:{vm.name}") as attached, locked(attached.ram.slots):
        attached.qmp.close()  # QEMU serves one client of a monitor at a time
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        refused(done, 4, "another ovr restores into this VM", f"process {os.getpid()}")
    assert not alive(vm, dump.pid)


@pytest.mark.parametrize(("mode", "part"), [("sample", 0), ("full", 0.7)])
def test_a_byte_that_changes_before_it_is_verified(vm, dump, monkeypatch, mode, part):
    original = Copier.verify

    def verify(copier, targets, mode):
        pieces = targets[0].pieces
        gva = Gva(int(pieces["gva"][int(part * len(pieces))]) + 1234 * (part > 0))
        space = targets[0].space
        with copier.holder.held():
            gpa = space.translate(gva)
            space.ram.write(gpa, bytes([space.ram.read(gpa, 1)[0] ^ 0x10]))
        return original(copier, targets, mode)

    monkeypatch.setattr(Copier, "verify", verify)
    with ovr.attach(f"lab:{vm.name}") as attached, pytest.raises(VerifyMismatch) as caught:
        attached.restore(dump.path, verify=mode)
    assert caught.value.exit_code == 7
    assert f"pid {dump.pid}: the page at 0x" in str(caught.value)
    assert not alive(vm, dump.pid)
    monkeypatch.undo()
    unharmed(vm, dump)


def test_images_that_are_cut_off_while_they_are_copied(vm, dump, tmp_path, monkeypatch):
    """When they have been read ahead: the copy itself is what meets the end."""
    images = tmp_path / "images"
    shutil.copytree(dump.path, images)
    [pages] = images.glob("pages-*.img")
    between_copies(monkeypatch, lambda: os.truncate(pages, 0))
    with ovr.attach(f"lab:{vm.name}") as attached, pytest.raises(ImagesDamaged) as caught:
        attached.restore(images)
    assert caught.value.exit_code == 6
    assert str(caught.value).startswith(f"{pages.name}: cannot be read: it was cut off")
    assert not alive(vm, dump.pid)
    monkeypatch.undo()
    unharmed(vm, dump)


@pytest.mark.parametrize("why", ["agent killed", *(["mismatch"] if EVERYTHING else [])])
def test_names_of_a_namespace_that_outlives_the_tree(vm, tmp_path, monkeypatch, why):
    """A process joins the tree's namespace and sets the nodename; the abort restores it."""
    vm.sh("rm -f /tmp/joined")
    [pid] = states.start(vm, 1)
    images = tmp_path / "images"
    images.mkdir()
    states.dump(vm, pid, images)
    write = settings.write
    seen = {}

    def joined(*arguments):
        inside = "hostname before-ovr; echo $$ > /tmp/joined; exec sleep 1000"
        with vm.connect() as agent:
            agent.spawn(["nsenter", f"--uts=/proc/{pid}/ns/uts", "sh", "-c", inside])
        states.wait_for(vm, "/tmp/joined")
        seen["before"] = hostname(vm)
        write(*arguments)
        seen["written"] = hostname(vm)

    def aborted(copier, targets, mode):
        if why == "mismatch":
            raise VerifyMismatch("not what was written")
        with suppress(AgentUnreachable), vm.connect() as agent:
            agent.run(["kill", "-9", str(agent.hello.pid)])  # the init starts another one
        await_death(vm, pid)
        raise AgentUnreachable("the link is broken")

    monkeypatch.setattr(settings, "write", joined)
    monkeypatch.setattr(Copier, "verify", aborted)
    with ovr.attach(f"lab:{vm.name}") as attached, pytest.raises(ovr.OvrError) as caught:
        attached.restore(images)
    undone = {(undo["state"], undo["outcome"]) for undo in caught.value.undone}
    assert seen["before"] == "before-ovr"
    assert seen["written"] not in ("before-ovr", vm.name)
    assert hostname(vm) == "before-ovr"
    assert ("nodename", "undone") in undone
    assert not alive(vm, pid)
    vm.sh("kill $(cat /tmp/joined)")


def await_death(vm, pid: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(Unreachable):
            if not alive(vm, pid):
                return
        time.sleep(0.2)
    pytest.fail("the tree is not killed")


def hostname(vm) -> str:
    """As who has joined the namespace sees it."""
    return vm.sh("nsenter --uts=/proc/$(cat /tmp/joined)/ns/uts hostname").stdout.decode().strip()


@pytest.fixture
def own_vm(suite, pool):
    """A VM that nobody uses afterwards: its vhost-user devices do not survive a reset."""
    vm = pool.get(suite)
    end_workload(vm)
    yield vm
    vm.down()


def reset(attached) -> None:
    attached.qmp.execute("set-action", reboot="reset")  # the lab's QEMU would rather end
    attached.qmp.execute("system_reset")


def test_reset_between_attach_and_restore(own_vm, dump, writes):
    with ovr.attach(f"lab:{own_vm.name}") as attached:
        reset(attached)
        with pytest.raises(AttemptFailed, match="rebooted since") as caught:
            attached.restore(dump.path)
    assert "booted" in caught.value.hint
    assert writes == []


@pytest.mark.skipif(not EVERYTHING, reason="much the same")
def test_reset_in_the_middle(own_vm, dump, writes, monkeypatch):
    with ovr.attach(f"lab:{own_vm.name}") as attached:

        def happens():
            reset(attached)
            writes.clear()

        between_copies(monkeypatch, happens)
        with pytest.raises(AttemptFailed, match="rebooted since"):
            attached.restore(dump.path)
    assert writes == []
    monkeypatch.undo()
    booted(own_vm)
    with ovr.attach(f"lab:{own_vm.name}") as attached:
        attached.restore(dump.path, agent=own_vm.serial, verify="full")


def booted(vm) -> None:
    """Wait until the agent of a guest that was reset answers, and make the guest what it was."""
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            vm.agent = vm.serial
            prepare(vm)
        except Unreachable:
            time.sleep(1)
        else:
            return
    pytest.fail("the guest does not come back")
