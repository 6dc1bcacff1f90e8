"""The wrappers in examples/ restore the demo process; the shell one as it is under plain CRIU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovr.images.framing import decode, frames
from ovr.images.stats import StatsEntry, decode_dump_stats
from tests.documents import block, run, said
from tests.vm.conftest import alive, end_workload, whole

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def suite():
    return "trixie"


def stats(data):
    [frame] = frames(data, "stats-restore")
    return decode(StatsEntry, frame.payload, "stats-restore").restore


def under_ovr(vm, dump, work):
    variables = {"CRIU": f"{sys.executable} -m ovr", "OVR_VM": f"lab:{vm.name}"}
    return subprocess.run(
        [EXAMPLES / "restore.sh", dump.path, work], env={**os.environ, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def under_criu(vm, dump):
    with vm.connect() as agent:
        agent.run(["mkdir", "/tmp/images"])
        for path in dump.path.glob("*.img"):
            agent.put(path, f"/tmp/images/{path.name}")
        agent.put(EXAMPLES / "restore.sh", "/tmp/restore.sh", 0o755)
        done = agent.run(["/tmp/restore.sh", "/tmp/images", "/tmp/criu-files"], timeout=300)
        agent.run(["rm", "-rf", "/tmp/images"])
    return done


def test_the_same_script_under_criu_and_under_ovr(vm, dump, tmp_path):
    criu = under_criu(vm, dump)
    assert criu.status == 0, criu.stderr.decode()
    pid = criu.stdout.decode()
    criu_files = set(vm.sh("ls /tmp/criu-files").stdout.decode().split())
    criu_stats = stats(vm.sh("cat /tmp/criu-files/stats-restore").stdout)
    whole(vm, dump)
    end_workload(vm)

    work = tmp_path / "work"
    done = under_ovr(vm, dump, work)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == pid == str(dump.pid)
    assert {path.name for path in work.iterdir()} >= criu_files
    ours = stats((work / "stats-restore").read_bytes())
    assert {field.name for field, _ in ours.ListFields()} == {
        field.name for field, _ in criu_stats.ListFields()
    }
    # CRIU does not count pages that it maps from a file; the tree has the others in its images.
    assert ours.pages_restored == pytest.approx(criu_stats.pages_restored, rel=0.01)
    whole(vm, dump)


def test_the_script_says_why_it_failed(vm, dump, tmp_path):
    first = under_ovr(vm, dump, tmp_path / "one")
    again = under_ovr(vm, dump, tmp_path / "two")
    assert (first.returncode, again.returncode) == (0, 1)
    assert f"pid {dump.pid} is taken" in again.stderr
    assert "Error (ovr/" in again.stderr
    assert not (tmp_path / "two" / "pid").exists()
    whole(vm, dump)


def test_the_python_wrapper(vm, dump, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "inventory.img").write_bytes(b"no image")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "restore.py", f"lab:{vm.name}", damaged, dump.path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.startswith(f"{dump.path}: pid {dump.pid}, VM held for ")
    assert done.stderr.startswith(f"{damaged}: Images")
    whole(vm, dump)


def test_the_python_wrapper_without_a_vm(dump):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "restore.py", "lab:nobody", dump.path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    assert "ovr lab up nobody" in done.stderr


def test_progress_as_json_lines(vm, dump):
    command = [sys.executable, "-m", "ovr", "restore", "--vm", f"lab:{vm.name}", "-D", dump.path]
    options = ["--json", "--progress", "json"]
    done = subprocess.run([*command, *options], capture_output=True, check=True)
    events = [json.loads(line) for line in done.stderr.splitlines()]
    measured = json.loads(done.stdout)["seconds"].keys() - {"total"}
    assert {event["phase"] for event in events} == measured
    assert {"attach", "skeleton", "memory", "commit"} <= measured
    assert [event["seconds"] for event in events] == sorted(event["seconds"] for event in events)
    whole(vm, dump)


def test_the_documented_script(vm, dump, tmp_path):
    """All is well; and an option that only the guest's CRIU can refuse is refused by it."""
    (tmp_path / "images").symlink_to(dump.path)
    work = tmp_path / "work"
    work.mkdir()
    documented = block("docs/criu-scripts.md", "OVR_VM=")
    script = said(documented, {"libvirt:web": f"lab:{vm.name}"}).rstrip()
    with pytest.raises(AssertionError, match="--manage-cgroups=nonsense"):
        run(f"{script} --manage-cgroups=nonsense", tmp_path)
    assert not alive(vm, dump.pid)
    assert not (work / "pid").exists()
    run(f"{script} --manage-cgroups=ignore", tmp_path)
    assert (work / "pid").read_text() == str(dump.pid)
    assert "Restore finished successfully" in (work / "restore.log").read_text()
    assert stats((work / "stats-restore").read_bytes()).pages_restored
    whole(vm, dump)
    dumped_again(vm, dump, tmp_path / "again")


def dumped_again(vm, dump, directory):
    """The restored process, by the documented command, and restored by CRIU alone."""
    for name in ("images", "work"):
        (directory / name).mkdir(parents=True)
    documented = block("docs/criu-scripts.md", "ovr dump -t")
    script = said(documented, {"4242": str(dump.pid)})
    run(script, directory, OVR_VM=f"lab:{vm.name}")
    assert not alive(vm, dump.pid)
    assert "Dumping finished successfully" in (directory / "work" / "dump.log").read_text()
    written = decode_dump_stats((directory / "work" / "stats-dump").read_bytes())
    assert written.frozen_time
    assert written.pages_written * 4096 >= dump.size
    restored_by_criu(vm, directory / "images")
    whole(vm, dump)


def restored_by_criu(vm, images):
    with vm.connect() as agent:
        agent.run(["mkdir", "/tmp/again"])
        for path in images.glob("*.img"):
            agent.put(path, f"/tmp/again/{path.name}")
        done = agent.run(["criu", "restore", "-d", "-D", "/tmp/again"], timeout=300)
        agent.run(["rm", "-rf", "/tmp/again"])
    assert done.status == 0, done.stderr.decode()
