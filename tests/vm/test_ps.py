"""What we read from outside is what the guest's own /proc says."""

import json
import re
import subprocess
import sys

from ovr.kernel import find_task, mm_space, vmas
from ovr.vm.attach import AttachedVm

# pid, starttime, then what we compare: ppid, state, thread ids, name.
SNAPSHOT = r"""
for d in /proc/[0-9]*; do
    stat=$(cat $d/stat 2>/dev/null) || continue
    rest=${stat##*) }
    set -- $rest
    tids=$(ls $d/task 2>/dev/null | tr '\n' ',')
    name=$(cat $d/comm 2>/dev/null) || continue
    shift 19 || continue
    start=$1
    set -- $rest
    echo "${d#/proc/}|$start|$2|$1|$tids|$name"
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
        threads = sorted(int(tid) for tid in tids.split(",") if tid)
        rows[int(pid), start] = (int(ppid), state, threads, name)
    return rows


def restful(name):
    """A name without the work that a kworker had last: it has another one every second."""
    return re.sub(r"(?<=kworker/[0-9u]).*", "", name)


def test_ps_agrees_with_proc(vm):
    vm.sh(BUSY + "sleep 1")
    before = snapshot(vm)
    done = subprocess.run(
        [sys.executable, "-m", "ovr", "ps", "--json", "--vm", f"lab:{vm.name}"],
        capture_output=True, check=True,
    )  # fmt: skip
    after = snapshot(vm)
    vm.sh("pkill -9 -x sleep; pkill -9 -f 'while :'")
    ours = {row["pid"]: row for row in json.loads(done.stdout)["processes"]}
    steady = {pid: row for (pid, start), row in before.items() if after.get((pid, start)) == row}
    assert len(steady) > 40
    assert {row[1] for row in steady.values()} >= {"R", "S", "T", "Z", "I"}
    for pid, (ppid, state, threads, name) in steady.items():
        row = ours[pid]
        assert (row["ppid"], sorted(row["threads"])) == (ppid, threads)
        assert restful(row["name"]) == restful(name)
        assert row["state"] == state, (pid, name)


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
