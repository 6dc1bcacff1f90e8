"""Values read from outside agree with the guest's own /proc."""

import json
import re
import subprocess
import sys

from ovr.kernel import find_task, mm_space, vmas
from ovr.vm.attach import AttachedVm

# pid, starttime, then what we compare: ppid, state, thread ids, name. All in the shell itself: the
# guest is busy, and a process takes long to start in it.
SNAPSHOT = r"""
for d in /proc/[0-9]*; do
    { IFS= read -r stat < $d/stat && IFS= read -r name < $d/comm; } 2>/dev/null || continue
    tids=$(cd $d/task 2>/dev/null && echo *)
    set -- ${stat##*) }
    state=$1; ppid=$2
    shift 19
    echo "${d#/proc/}|$1|$ppid|$state|$tids|$name"
done
"""

BUSY = r"""
for i in 1 2 3; do (while :; do :; done) & done
sleep 1000 & stopped=$!; kill -STOP $stopped
(sleep 1000 & exec sleep 1000) &
sh -c 'sleep 0.01 & exec sleep 1000' &
"""


def snapshot(vm):
    rows = {}
    for line in vm.sh(SNAPSHOT, timeout=300).stdout.decode(errors="surrogateescape").splitlines():
        pid, start, ppid, state, tids, name = line.split("|", 5)
        threads = sorted(int(tid) for tid in tids.split())
        rows[int(pid), start] = (int(ppid), state, threads, restful(name))
    return rows


def restful(name):
    """A name without the work that a kworker had last: it has another one every second."""
    return re.sub(r"(?<=kworker/[0-9u]).*", "", name)


def reading(vm):
    command = [sys.executable, "-m", "ovr", "ps", "--json", "--vm", f"lab:{vm.name}"]
    done = subprocess.run(command, capture_output=True, check=True)
    return {
        row["pid"]: (row["ppid"], row["state"], sorted(row["threads"]), restful(row["name"]))
        for row in json.loads(done.stdout)["processes"]
    }


def but_for_work(row):
    """A row without what kernel threads, and the agent that we ask, change with work: the state."""
    ppid, state, threads, name = row
    works = (ppid in (0, 2) or name == "ovr-agent") and state in "RSDI"
    return (ppid, "R, S, D or I" if works else state, threads, name)


def test_ps_agrees_with_proc(vm):
    vm.sh(BUSY + "sleep 1")
    before = snapshot(vm)
    readings = [reading(vm) for _ in range(5)]
    after = snapshot(vm)
    vm.sh("pkill -9 -x sleep; pkill -9 -f 'while :'")
    steady = {pid: row for (pid, start), row in before.items() if after.get((pid, start)) == row}
    assert len(steady) > 40
    assert {row[1] for row in steady.values()} >= {"R", "S", "T", "Z", "I"}
    exact = 0
    for pid, row in steady.items():
        found = [reading[pid] for reading in readings if pid in reading]
        assert but_for_work(row) in map(but_for_work, found), pid
        exact += row in found
    assert exact > 0.8 * len(steady)


def test_areas_and_pages_agree_with_proc(vm):
    """VMAs against /proc/PID/maps, our page walk against /proc/PID/pagemap, for pid 1."""
    maps = vm.sh("cat /proc/1/maps").stdout.decode().splitlines()
    wanted = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
    with AttachedVm(f"lab:{vm.name}") as attached:
        task = find_task(attached.kernel, 1)
        found = [(vma.start, vma.end) for vma in vmas(task.mm)]
        assert found == [area for area in wanted if area[0] < 1 << 56]
        space = mm_space(attached.kernel, task.mm)
        checked = 0
        for start, end in found:
            command = (
                f"dd if=/proc/1/pagemap bs=8 skip={start >> 12} count={(end - start) >> 12} "
                "2>/dev/null | od -An -v -t x8 -w8"
            )
            for number, word in enumerate(vm.sh(command).stdout.split()):
                entry = int(word, 16)
                if entry >> 63:
                    assert space.translate(start + (number << 12)) >> 12 == entry & (1 << 55) - 1
                    checked += 1
    assert checked > 10
