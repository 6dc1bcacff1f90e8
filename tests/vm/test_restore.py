"""A process dumped in one VM comes back in another, and finds itself whole."""

import json
import re
import subprocess
import sys
from string import ascii_lowercase

import pytest

import ovr
from ovr.cli.criu_options import RESTORE
from ovr.errors import CriuFailed
from ovr.images import ImageSet
from ovr.lab.demo import answer_of
from ovr.plan import NO_POOL, build_inside, make_plan
from tests.vm.conftest import EVERYTHING, SIZE, SUITES, UMASK, alive, contained_in, end_workload

# 4 levels of page tables, which other tests do not have, and RAM above 4 GiB. test_under_fire.py
# has two NUMA nodes, test_states.py all suites.
MACHINES = [("trixie", {"memory": "3G", "la57": False})]
if EVERYTHING:
    MACHINES += [
        ("trixie", {"memory": "1G", "numa": 2}),
        ("bookworm", {"memory": "3G", "la57": True}),
        ("forky", {"memory": "1G", "la57": True}),
        ("trixie", {"memory": "1G", "la57": True}),
        ("bookworm", {"memory": "1G", "la57": False}),
    ]


def whole(vm, dump):
    answer = answer_of(vm, dump.pid)
    assert answer.words == SIZE // 8
    assert (answer.wrong, answer.first_wrong) == (0, -1)
    assert int(answer.umask, 8) == UMASK


@pytest.mark.parametrize(
    ("suite", "hardware"),
    MACHINES,
    ids=[" ".join([suite, *(f"{k}={v}" for k, v in hw.items())]) for suite, hw in MACHINES],
)
def test_memory_and_umask_come_back(pool, dumps, suite, hardware):
    vm, dump = pool.get(suite, **hardware), dumps[suite]
    end_workload(vm)
    with ovr.attach(f"lab:{vm.name}") as attached:
        assert attached.kernel.space.levels == (4 if hardware.get("la57") is False else 5)
        assert len({slot.file for slot in attached.ram.slots}) == hardware.get("numa", 1)
        report = attached.restore(dump.path, verify="full")
    assert report.pid == dump.pid
    assert report.bytes_outside / report.bytes_total >= 0.99
    assert report.bytes_verified == report.bytes_outside
    assert {"memory", "umask"} <= set(report.states)
    whole(vm, dump)


@pytest.mark.parametrize("outside", ["memory", "umask"])
def test_one_kind_outside_the_other_inside(vm, dump, outside):
    with ovr.attach(f"lab:{vm.name}") as attached:
        report = attached.restore(dump.path, outside=[outside])
    assert report.states == (outside,)
    assert (report.bytes_outside > 0) == (outside == "memory")
    whole(vm, dump)


def test_load_bearing(vm, dump, tmp_path):
    """CRIU alone on the inside images: no memory, its stack included. So it was we who wrote it."""
    with ImageSet.open(dump.path) as images, vm.connect() as agent:
        agent.run(["rm", "-rf", "/tmp/inside"])
        agent.run(["mkdir", "/tmp/inside"])
        plan = make_plan(images)
        for name, content in build_inside(plan, NO_POOL).images.items():
            local = tmp_path / name
            local.write_bytes(b"".join(ovr.images.image_chunks(content)))
            agent.put(local, f"/tmp/inside/{name}")
        done = agent.run(["criu", "restore", "-d", "-D", "/tmp/inside", "-o", "restore.log"])
        assert done.status == 0, agent.run(["tail", "/tmp/inside/restore.log"]).stdout.decode()
    vm.sh(f"kill -USR1 {dump.pid}; for i in $(seq 50); do test -d /proc/{dump.pid} || exit; "
          "sleep 0.1; done")  # fmt: skip
    assert not alive(vm, dump.pid)
    assert "segfault" in vm.sh("dmesg | grep ovr-neutral").stdout.decode()


@pytest.mark.parametrize("transport", ["vsock", "serial"])
def test_both_transports(vm, dump, transport):
    address = vm.agent if transport == "vsock" else vm.serial
    with ovr.attach(f"qmp:{vm.qmp}") as attached:
        attached.restore(dump.path, agent=address)
    whole(vm, dump)


def test_twice_in_a_row(vm, dump):
    for _ in range(2):
        with ovr.attach(f"pid:{vm.pid}") as attached:
            attached.restore(dump.path, agent=vm.agent, verify="none")
        whole(vm, dump)
        end_workload(vm)


def restore_command(vm, dump, *options):
    command = [sys.executable, "-m", "ovr", "restore", *options, "-D", dump.path]
    done = subprocess.run(
        [*command, "--vm", f"lab:{vm.name}"], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_command(vm, dump):
    report = json.loads(restore_command(vm, dump, "--json"))
    assert report["schema"] == "ovr.restore/1"
    phases = {"attach", "plan", "skeleton", "memory", "state", "verify", "total"}
    assert phases <= report["seconds"].keys()
    assert report["held"]["count"] > 0
    whole(vm, dump)


def test_dry_run_leaves_the_guest_alone(vm, dump):
    first = restore_command(vm, dump, "--dry-run").splitlines()[:2]
    assert first[0].startswith("outside: ")
    assert "memory" in first[1]
    assert "umask" in first[1]
    assert vm.sh(f"test -d /proc/{dump.pid}").status != 0


def test_what_made_criu_fail(vm, dump):
    """Its first error and the cure, however CRIU and the kill that follows it are scheduled."""
    with ovr.attach(f"lab:{vm.name}") as attached:
        attached.restore(dump.path, verify="none")
    path = vm.sh(f"readlink /proc/{dump.pid}/exe").stdout.decode().strip()
    size = vm.sh(f"stat -c %s {path}").stdout.decode().strip()
    end_workload(vm)
    vm.sh(f"mv {path} {path}.away")
    try:
        for _ in range(4):
            with ovr.attach(f"lab:{vm.name}") as attached, pytest.raises(CriuFailed) as caught:
                attached.restore(dump.path, verify="none")
            assert f"Can't open file {path[1:]}" in str(caught.value)
            assert f"put {path} into the guest" in caught.value.hint
            assert f"at the dump it had {size} bytes" in caught.value.hint
            assert "OOM" not in caught.value.hint
    finally:
        vm.sh(f"mv {path}.away {path}")


@contained_in("test_pool.py::test_memory_looks_as_after_criu_alone[forky-private]")
def test_areas_look_as_after_plain_criu(vm, dump):
    """The cuts and populate bits of the inside images leave no trace."""
    wanted = smaps(vm, dump, lambda: plain_criu(vm, dump))
    end_workload(vm)

    def outside():
        with ovr.attach(f"lab:{vm.name}") as attached:
            attached.restore(dump.path)

    assert smaps(vm, dump, outside) == wanted


def smaps(vm, dump, restore):
    restore()
    # A page of the program is dirty until it is written back, whoever maps it.
    text = vm.sh(f"sync; cat /proc/{dump.pid}/smaps").stdout.decode()
    kept = ("VmFlags", "Rss", "Shared_Clean", "Private_Dirty")
    areas = []
    for line in text.splitlines():
        key = line.split(":")[0]
        if "-" in key and ":" in line and not line[0].isupper():
            areas.append([line])
        elif key in kept and "[stack]" not in areas[-1][0]:
            areas[-1].append(line)
    return areas


def plain_criu(vm, dump):
    with vm.connect() as agent:
        agent.run(["rm", "-rf", "/tmp/images"])
        agent.run(["mkdir", "/tmp/images"])
        for path in dump.path.glob("*.img"):
            agent.put(path, f"/tmp/images/{path.name}")
        done = agent.run(["criu", "restore", "-d", "-D", "/tmp/images"], timeout=120)
        agent.run(["rm", "-rf", "/tmp/images"])
    assert done.status == 0, done.stderr.decode()


def test_demo_prints_one_object():
    done = subprocess.run(
        [sys.executable, "-m", "ovr", "demo", "--json", "--size", "64M", "--memory", "1G"],
        capture_output=True, check=True,
    )  # fmt: skip
    outcome = json.loads(done.stdout)
    assert outcome["schema"] == "ovr.demo/1"
    assert outcome["verified"] is True
    assert outcome["umask"] == "0137"
    assert outcome["bytes_inside"] + outcome["bytes_outside"] == outcome["bytes_total"]
    assert outcome["bytes_outside"] / outcome["bytes_total"] >= 0.99
    assert outcome["copy_gb_per_s"] > 0


@pytest.mark.parametrize("suite", SUITES if EVERYTHING else ("forky",), indirect=True)
def test_every_option_of_criu_is_known(vm):
    """The newest CRIU has most. Its parser lists the options that an abbreviation may mean."""
    words = " ".join(f"--{a}" for a in ascii_lowercase)
    said = vm.sh(f"for word in {words}; do criu restore $word; done 2>&1").stdout.decode()
    asked = re.findall(r"'--(\w)' is ambiguous", said)
    assert len(asked) > 10
    listed = set(re.findall(r"'(--[\w-]{2,})'", said))
    known = {name for option in RESTORE for name in option.names}
    known |= {f"--no-{name[2:]}" for name in known}
    assert sorted(listed - known) == []
