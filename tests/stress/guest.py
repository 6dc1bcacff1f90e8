"""The guest under stress: what is switched on in it, and what it says afterwards."""

from dataclasses import dataclass

from ovr import lab
from tests.subject import HERE, build, must

__all__ = ["TROUBLE", "Canaries", "Noise", "trouble"]

TROUBLE = "BUG|WARNING|Oops|Call Trace|Bad page|Bad rss|corrupt|hung_task|blocked for more"
CGROUP = "ovr-stress"
PROGRAM = "/usr/local/bin/ovr-noise"
SWAP = "/usr/local/bin/ovr-swap"
NOISE = "/run/ovr-noise"  # as in noise.c
COUNTERS = {
    "compact_isolated": "pages taken by compaction",
    "thp_collapse_alloc": "huge pages collapsed",
    "numa_pages_migrated": "pages moved by NUMA balancing",
    "pgmigrate_success": "pages migrated",
    "pswpout": "pages swapped out",
}

_SET_UP = f"""
    set -e
    put() {{ if [ -e "$2" ]; then echo "$1" > "$2"; fi; }}

    # Swap, so that anonymous memory can be reclaimed: zram and a file in turn.
    modprobe zram
    echo 512M > /sys/block/zram0/disksize
    fallocate -l 512M /swap
    chmod 600 /swap
    for swap in /dev/zram0 /swap; do mkswap -q $swap; swapon -p 1 $swap; done
    echo 200 > /proc/sys/vm/swappiness

    # The agent, and with it CRIU and what it restores, in a cgroup whose memory is reclaimed.
    mkdir -p /sys/fs/cgroup/{CGROUP} {NOISE}
    echo +memory > /sys/fs/cgroup/cgroup.subtree_control
    echo $PPID > /sys/fs/cgroup/{CGROUP}/cgroup.procs

    cd /sys/kernel/mm/transparent_hugepage
    echo always > enabled
    echo always > defrag
    echo 0 > khugepaged/scan_sleep_millisecs
    echo 0 > khugepaged/alloc_sleep_millisecs
    echo 8192 > khugepaged/pages_to_scan
    echo 511 > khugepaged/max_ptes_none
    echo 511 > khugepaged/max_ptes_swap

    cd /sys/kernel/mm/ksm
    echo 1 > use_zero_pages
    put 0 smart_scan
    echo 0 > sleep_millisecs
    echo 1000 > pages_to_scan
    echo 1 > run

    mount -t debugfs none /sys/kernel/debug 2>/dev/null || true
    echo 1 > /proc/sys/kernel/numa_balancing
    put 0 /sys/kernel/debug/sched/numa_balancing/scan_delay_ms
    put 100 /sys/kernel/debug/sched/numa_balancing/scan_period_min_ms
    put 200 /sys/kernel/debug/sched/numa_balancing/scan_period_max_ms
"""
_CALM = "echo 0 > /sys/kernel/mm/ksm/run; pkill -9 -x 'ovr-noise|ovr-swap'; true"


@dataclass(frozen=True)
class Canaries:
    """Processes that check their memory all the time.

    Attributes:
        passes: how often each of them has checked all that it has.
        wrong: how many pages were wrong.
    """

    passes: tuple[int, ...]
    wrong: int


class Noise:
    """The noise in a guest.

    Args:
        vm: with two NUMA nodes.
        canaries: how many.
        mib: how much memory each of them has, in MiB.
    """

    def __init__(self, vm: lab.LabVm, canaries: int, mib: int) -> None:
        self._vm = vm
        self._canaries = canaries
        self._mib = mib
        vm.put(build(HERE.parent / "stress" / "noise.c"), PROGRAM, 0o755)
        vm.put(build(HERE.parent / "stress" / "swap.c"), SWAP, 0o755)
        must(vm, _SET_UP)

    def start(self) -> None:
        """Start it, and wait until the canaries have filled their memory."""
        words = (CGROUP, self._canaries, self._mib)
        with self._vm.connect() as agent:
            agent.spawn([PROGRAM, *map(str, words)])
            agent.spawn([SWAP, "chase"])
        there = f"[ $(ls {NOISE}/canary-? | wc -l) = {self._canaries} ]"
        must(self._vm, f"for i in $(seq 600); do {there} && exit; sleep 0.1; done; exit 1")

    def reclaim(self) -> None:
        """Have all memory of the restored tree written to swap."""
        must(self._vm, f"{SWAP} out $(pgrep -x ovr-subject)")

    def stop(self) -> None:
        """End it."""
        must(self._vm, _CALM)

    def canaries(self) -> Canaries:
        """Return the findings of the canaries."""
        lines = must(self._vm, f"cat {NOISE}/canary-?").splitlines()
        assert len(lines) == self._canaries, lines
        assert self._vm.sh("pgrep -c -x ovr-noise").status == 0, "the noise has died"
        found = [(int(passes), int(wrong)) for passes, wrong in map(str.split, lines)]
        return Canaries(tuple(one for one, _ in found), sum(wrong for _, wrong in found))

    def counters(self) -> dict[str, int]:
        """How much the kernel has done since it booted, by what it did."""
        counts = dict(map(str.split, must(self._vm, "cat /proc/vmstat").splitlines()))
        shared = must(self._vm, "cat /sys/kernel/mm/ksm/pages_sharing")
        migrated, paged_out, collapsed = must(self._vm, f"cat {NOISE}/moved").split()
        return {
            **{what: int(counts[name]) for name, what in COUNTERS.items() if name in counts},
            "pages merged by KSM": int(shared),
            "times that held tasks were moved to another node": int(migrated),
            "pieces of held tasks written to swap": int(paged_out),
            "pieces of held tasks collapsed into huge pages": int(collapsed),
        }


def trouble(vm: lab.LabVm) -> str:
    """Return the complaints of the guest's kernel."""
    return vm.sh(f"dmesg | grep -E '{TROUBLE}'").stdout.decode(errors="replace")
