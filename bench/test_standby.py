"""Time that `ovr restore` takes to start, with a standby process and without one.

The command ends as soon as it has been loaded and has read its arguments, for there is no such VM.
"""

import os
import subprocess
import sys
import uuid

import pytest

from bench.conftest import SMOKE
from bench.outside import ENVIRONMENT

# Both sides meet at the path of their Python: no other standby process is asked.
RUN = "import runpy, sys; sys.prefix = sys.argv.pop(1)\n"
RUN += "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def command(name: str, module: str, *words: str) -> list[str]:
    return [sys.executable, "-c", RUN, name, module, *words]


@pytest.fixture(params=["alone", "standing by"])
def name(request):
    found = f"/bench/{uuid.uuid4().hex}"
    if request.param == "alone":
        yield found
        return
    with subprocess.Popen(["sleep", "600"]) as vm:
        started = command(found, "ovr.cli.standby", str(vm.pid))
        subprocess.run(started, check=True, capture_output=True, timeout=60)
        yield found
        vm.kill()  # and the process ends


@pytest.mark.benchmark(group="start of ovr restore")
def test_start(benchmark, name, request):
    words = command(name, "ovr", "restore", "--vm", "lab:-", "-v")

    def start():
        return subprocess.run(
            words, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=os.sep
        )

    start()  # compiles modules that are not compiled yet
    done = benchmark.pedantic(start, rounds=1 if SMOKE else 30)
    assert done.returncode == 2, done.stderr
    served = "done by the standby process" in done.stderr
    assert served == (request.node.callspec.params["name"] == "standing by")
