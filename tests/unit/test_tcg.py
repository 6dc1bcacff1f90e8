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

RUNS = set()

@pytest.fixture
def first(request):
    new = request.path not in RUNS
    RUNS.add(request.path)
    return new
"""


FELL = "Oops: int3: 0000 [#1] PREEMPT SMP NOPTI"
OTHER_DEATHS = {
    "oops": "Oops: 0002 [#1] PREEMPT SMP",
    "panic": "Kernel panic - not syncing",
}
MODULES = {
    "new_vm": f"""
def test_it(vm, first):
    if first:
        vm.console.write_text("{FELL}")
    assert vm.console.read_text() == "ready\\n"

def test_next(vm):
    assert vm.console.read_text() == "ready\\n"
""",
    "no_failure": f"""
def test_it(vm):
    vm.console.write_text("{FELL}")
    assert not vm.ram
""",
    "again": f"""
def test_it(vm):
    vm.console.write_text("{FELL}")
    assert vm.ram
""",
    "in_a_fixture": f"""
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
""",
    "boot_again": f"""
from conftest import boot

def test_it(first):
    vm = boot("mine-2")
    vm.console.write_text("{FELL}")
    vm.down()
    boot("mine-2").down()
    assert not first
""",
} | {
    name: f"""
def test_it(vm, first):
    vm.console.write_text("{death}")
    assert not first
"""
    for name, death in OTHER_DEATHS.items()
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The output of pytest for all modules; their tests may use `vm` and `first`."""
    directory = tmp_path_factory.mktemp("modules")
    (directory / "conftest.py").write_text(CONFTEST)
    for name, module in MODULES.items():
        (directory / f"test_{name}.py").write_text(module)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(directory), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:benchmark", *(
            f"test_{name}.py" for name in MODULES
        )],
        cwd=directory, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not list((directory / "ovr" / "lab").glob("mine*")), done.stdout
    return done.stdout


def outcomes(said: str, name: str) -> list[str]:
    """Return the outcomes of a module's tests."""
    return re.findall(rf"^test_{name}\.py::\w+ (\w+)", said, re.MULTILINE)


def ran_again(said: str, name: str) -> list[str]:
    """Return why tests of a module ran again."""
    return re.findall(rf"^RAN AGAIN test_{name}\.py::test_it: (.*)", said, re.MULTILINE)


def test_runs_again_with_a_new_vm(said):
    assert outcomes(said, "new_vm") == ["PASSED", "PASSED"]
    assert ran_again(said, "new_vm") == ["stale int3 in mine-1 (TCG)"]


def test_runs_again_only_if_it_failed(said):
    assert outcomes(said, "no_failure") == ["PASSED"]
    assert not ran_again(said, "no_failure")


def test_runs_again_once(said):
    assert outcomes(said, "again") == ["FAILED"]
    assert ran_again(said, "again") == ["stale int3 in mine-1 (TCG)"]
    assert f"console of mine-1 -\n{FELL}" in said.replace("-" * 5, "").replace("\n\n", "\n")


@pytest.mark.parametrize("name", OTHER_DEATHS)
def test_other_deaths_are_not_forgiven(said, name):
    assert outcomes(said, name) == ["FAILED"]
    assert not ran_again(said, name)
    assert OTHER_DEATHS[name] in said


def test_a_vm_that_fell_in_a_fixture(said):
    """The fixture has ended it already."""
    assert outcomes(said, "in_a_fixture") == ["PASSED"]
    assert ran_again(said, "in_a_fixture") == ["stale int3 in mine-2 (TCG)"]


def test_a_boot_that_was_tried_again(said):
    assert outcomes(said, "boot_again") == ["FAILED"]
    assert not ran_again(said, "boot_again")
