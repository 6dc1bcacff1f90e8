"""What a move refuses before it connects to any agent."""

import os
from types import SimpleNamespace

import pytest

from ovr.errors import UsageError
from ovr.move import scratch
from ovr.move.story import move


def vm_with(path):
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    slot = SimpleNamespace(gpa=0, file=SimpleNamespace(fileno=lambda: fd))
    return SimpleNamespace(
        ram=SimpleNamespace(slots=[slot]), address=SimpleNamespace(agent="vsock:3")
    ), fd


def test_a_vm_that_is_attached_twice(tmp_path):
    one, first = vm_with(tmp_path / "ram")
    other, second = vm_with(tmp_path / "ram")
    with pytest.raises(UsageError) as caught:
        move(one, other, 7)
    assert caught.value.code == "same-vm"
    os.close(first)
    os.close(second)


def test_a_host_without_memory_for_images(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "_MEMORY", tmp_path / "missing")
    one, first = vm_with(tmp_path / "ram")
    other, second = vm_with(tmp_path / "another")
    with pytest.raises(UsageError) as caught:
        move(one, other, 7)
    assert "missing" in str(caught.value)
    os.close(first)
    os.close(second)
