"""A setup of `make kernels`, another from commit to commit, with a few programs of the pool.

OVR_KERNELS names setups instead, separated by commas; `python -m tests.kernels --list` has them.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.kernels.run import RESTORED, run
from tests.kernels.setups import SETUPS, Setup, in_turn
from tests.vm import pool
from tests.vm.conftest import EVERYTHING, PREFIX

PROGRAMS = ("private", "threads", "cow", "shared")
ROOT = Path(__file__).parents[2]


def chosen() -> list[Setup]:
    if names := os.environ.get("OVR_KERNELS"):
        by_name = {setup.name: setup for setup in SETUPS}
        return [by_name[name.strip()] for name in names.split(",")]
    return in_turn(commits(), 2 if EVERYTHING else 1)


def commits() -> int:
    """How many commits there are up to this one; 0 where there is no repository."""
    done = subprocess.run(
        ["git", "rev-list", "--count", "HEAD"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return int(done.stdout) if done.returncode == 0 else 0


@pytest.mark.parametrize("setup", chosen(), ids=lambda setup: setup.name)
def test_restores_on(setup, tmp_path):
    print(f"again with OVR_KERNELS={setup.name!r}")
    programs = [pool.BY_NAME[name] for name in PROGRAMS]
    outcome = run(f"{PREFIX}kernel", setup, programs, tmp_path, say=print)
    assert not outcome.trouble
    assert outcome.programs == dict.fromkeys(PROGRAMS, RESTORED)
