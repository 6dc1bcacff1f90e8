"""A test whose guest died of TCG's stale int3 runs again, and no other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFTEST = """
import pytest
from ovr import lab
from ovr.lab.qemu import Hardware
from ovr.vm.find import lab_directory
from tests.tcg import Guests

def pytest_configure(config):
    config.pluginmanager.register(Guests("mine-"))

@pytest.fixture(scope="module")
def vm():
    made = boot("mine-1")
    yield made
    made.down()

def boot(name):
    where = lab_directory(name)
    where.mkdir(parents=True, exist_ok=True)
    hardware = Hardware(1 << 30, 2, "tcg", None, 1)
    vm = lab.LabVm(name, "trixie", hardware, where / "qmp", "", "", where / "console", ())
    vm.console.write_text("ready\\n")
    vm.save()
    return vm

@pytest.fixture
def first(request):
    count = request.config.cache.get("runs", 0)
    request.config.cache.set("runs", count + 1)
    return count == 0
"""


@pytest.fixture
def outcome(tmp_path):
    """Run a module of tests that have `vm` and `first`; give what pytest says."""

    def run(module: str) -> str:
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "test_it.py").write_text(module)
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-v", "-p", "no:benchmark", "test_it.py"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert not list((tmp_path / "ovr" / "lab").glob("mine*")), done.stdout
        return done.stdout

    return run


FELL = "Oops: int3: 0000 [#1] PREEMPT SMP NOPTI"


def test_runs_again_with_a_new_vm(outcome):
    said = outcome(
        f"""
def test_it(vm, first):
    if first:
        vm.console.write_text("{FELL}")
    assert vm.console.read_text() == "ready\\n"

def test_next(vm):
    assert vm.console.read_text() == "ready\\n"
"""
    )
    assert re.search(r"RAN AGAIN .*::test_it: stale int3 in mine-1", said), said
    assert "2 passed" in said


def test_runs_again_once(outcome):
    said = outcome(f'def test_it(vm):\n    vm.console.write_text("{FELL}")\n    assert not vm.ram')
    assert "1 passed" in said
    said = outcome(f'def test_it(vm):\n    vm.console.write_text("{FELL}")\n    assert vm.ram')
    assert "1 failed" in said
    assert f"console of mine-1 -\n{FELL}" in said.replace("-" * 5, "").replace("\n\n", "\n")


@pytest.mark.parametrize("death", ["Oops: 0002 [#1] PREEMPT SMP", "Kernel panic - not syncing"])
def test_other_deaths_are_not_forgiven(outcome, death):
    module = f'def test_it(vm, first):\n    vm.console.write_text("{death}")\n    assert not first'
    said = outcome(module)
    assert "1 failed" in said
    assert death in said


def test_a_vm_that_fell_in_a_fixture(outcome):
    """The fixture has ended it already."""
    said = outcome(
        f"""
import pytest
from conftest import boot

@pytest.fixture
def booted(first):
    vm = boot("mine-2")
    if first:
        vm.console.write_text("{FELL}")
        vm.down()
        raise OSError("dead")
    yield vm
    vm.down()

def test_it(booted):
    pass
"""
    )
    assert "stale int3 in mine-2" in said
    assert "1 passed" in said


def test_a_boot_that_was_tried_again(outcome):
    said = outcome(
        f"""
from conftest import boot

def test_it(first):
    vm = boot("mine-2")
    vm.console.write_text("{FELL}")
    vm.down()
    boot("mine-2").down()
    assert not first
"""
    )
    assert "1 failed" in said
