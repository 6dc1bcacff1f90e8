"""The wheel, installed into an empty environment, restores a process."""

import json
import subprocess

from ovr.demo import answer_of
from tests.vm.conftest import SIZE, UMASK, Pool


def test_the_wheel_restores(installed, pool: Pool, dumps):
    dump, vm = dumps["trixie"], pool.get("trixie")
    command = [installed / "ovr", "restore", "--json", "--vm", f"lab:{vm.name}", "-D", dump.path]
    done = subprocess.run(command, capture_output=True, check=True, cwd="/")
    assert json.loads(done.stdout)["pid"] == dump.pid
    answer = answer_of(vm, dump.pid)
    assert (answer.words, answer.wrong, int(answer.umask, 8)) == (SIZE // 8, 0, UMASK)
