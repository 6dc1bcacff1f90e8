"""How long it takes to stop a process with threads, and to let it go: by ptrace, and by SIGSTOP."""

import json
import os

import pytest

from bench.race import Replay
from tests.unit.machine_process import RunningMachine, run_script

# Without the right to trace it, ovr stops it by SIGSTOP.
UNPRIVILEGED = (
    ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace") if os.geteuid() == 0 else ()
)
SCRIPT = """
import json
stop, let_go = [], []
with Holder(Monitor(pid)) as holder:
    for _ in range(int(sys.argv[2])):
        time.sleep(0.005)
        begin = time.perf_counter()
        with holder.held():
            held = time.perf_counter()
        stop.append(held - begin)
        let_go.append(time.perf_counter() - held)
print(json.dumps([holder.way, stop, let_go]))
"""


@pytest.mark.benchmark(group="stop all threads", timer=(replay := Replay()))
@pytest.mark.parametrize("threads", [4, 20])
@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("way", ["ptrace", "sigstop"])
def test_stop(benchmark, tmp_path, way, state, threads):
    rounds = 2 if os.environ.get("OVR_BENCH") == "smoke" else 200
    options = [*(["idle"] if state == "idle" else []), *(["undumpable"] * (way == "sigstop"))]
    machine = RunningMachine(tmp_path, *options, threads=threads)
    try:
        process = run_script(
            SCRIPT, machine.pid, rounds, prefix=UNPRIVILEGED if way == "sigstop" else ()
        )
        out, errors = process.communicate()
        assert not errors
    finally:
        machine.close()
    found, stop, let_go = json.loads(out)
    assert found == way
    benchmark.extra_info["let_go_ms"] = sorted(let_go)[len(let_go) // 2] * 1e3
    replay.tell(benchmark, stop)
