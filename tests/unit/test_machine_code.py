"""Instructions of the native module that a compiler might drop without another test failing."""

import re
import shutil
import subprocess

import pytest

from ovr import _fastcopy


def test_struct_pages_are_fetched_ahead():
    """GCC drops calls of a function that only fetches, as without effect: a walk takes four times
    as long then."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump")
    command = [objdump, "--disassemble", "--no-show-raw-insn", _fastcopy.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\bprefetch", code)
