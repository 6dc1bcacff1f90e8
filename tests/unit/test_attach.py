"""A VM that was attached to and closed is freed at once, not when Python looks for cycles."""

import gc
import weakref
from types import SimpleNamespace

import pytest

from ovr.kernel import processes
from ovr.vm import attach
from ovr.vm.attach import AttachedVm
from ovr.vm.qmp import Monitor

from .kernel.toy import ToyKernel
from .machine import Machine


class Qemu(Monitor):
    """Nothing that is asked here is QEMU's to say."""

    qemu_pid = 1

    def close(self):
        pass

    def execute(self, command, **arguments):
        raise AssertionError(command)

    _unreachable = execute


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine = Machine.build(tmp_path)
    slots = machine.ram.slots
    monkeypatch.setattr(attach, "find_vm", lambda spec: SimpleNamespace(connect=Qemu, spec=spec))
    monkeypatch.setattr(attach, "guest_slots", lambda qmp: slots)
    return machine


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def parts(vm):
    found = [vm, vm.qmp, vm.ram, vm.kernel, vm.kernel.space, vm.kernel.symbols, vm.kernel.types.btf]
    return {type(part).__name__: weakref.ref(part) for part in found}


def left(refs):
    return [name for name, ref in refs.items() if ref() is not None]


@pytest.mark.parametrize("stale", [False, True])
def test_it_is_freed_without_the_garbage_collector(machine, no_collector, stale):
    toy = ToyKernel(machine)
    if stale:  # what a reboot has left: its place is looked at, too, and found to be wrong
        note = machine.ram.read(toy.note, 4096)
        machine.ram.write(0x10_0000, note.replace(b"6.12.0", b"9.9"))
    with AttachedVm("lab:toy") as vm:
        assert [process.comm for process in processes(vm.kernel)] == ["init"]
        refs = parts(vm)
        assert len(left(refs)) == 7
    del vm
    assert left(refs) == []
