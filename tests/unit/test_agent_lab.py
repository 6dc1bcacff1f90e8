"""Lab builds of the agent, with the real agent."""

import subprocess
import time
from pathlib import Path

import pytest

from ovr.errors import LabError
from ovr.guest import build, lab_protocol
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import AgentHost, alive, wait_for

BLOCK = bytes(range(256)) * 4096


def test_run(agent: LabAgent) -> None:
    done = agent.run(["sh", "-c", "cat; echo wrong >&2; exit 3"], input=b"hello")
    assert (done.status, done.stdout, done.stderr) == (3, b"hello", b"wrong\n")
    assert agent.run(["sh", "-c", "kill -9 $$"]).status == 137
    assert agent.run(["env"], env=["A=b"]).stdout == b"A=b\n"
    assert b"PATH=" in agent.run(["env"]).stdout


def test_run_passes_much_both_ways_at_once(agent: LabAgent) -> None:
    assert agent.run(["cat"], input=BLOCK * 20).stdout == BLOCK * 20


def test_input_that_nobody_reads(agent: LabAgent) -> None:
    assert agent.run(["true"], input=BLOCK * 4).status == 0
    agent.ping()


def test_run_ends_with_its_command_not_with_its_children(agent: LabAgent) -> None:
    start = time.monotonic()
    done = agent.run(["sh", "-c", "sleep 120 & echo $!"])
    assert time.monotonic() - start < 60
    agent.run(["kill", done.stdout.decode().strip()])


def test_run_takes_too_long(agent: LabAgent) -> None:
    with pytest.raises(LabError, match="took longer"):
        agent.run(["sh", "-c", "sleep 20; true"], timeout=0.3)
    agent.ping()


def test_run_what_is_not_there(agent: LabAgent) -> None:
    with pytest.raises(LabError, match="No such file"):
        agent.run(["/nonexistent"])
    with pytest.raises(LabError):
        agent.run([])
    agent.ping()


def test_command_dies_with_its_session(agent: LabAgent, host: AgentHost, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with host.connect() as other:
        pid = other.spawn(["sh", "-c", f"echo $$ > {pid_file}; exec sleep 30"])
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
    # Spawned is detached, it stays …
    time.sleep(0.2)
    assert alive(pid)
    agent.run(["kill", str(pid)])
    wait_for(lambda: not alive(pid))
    # … run is not.
    pid_file.unlink()
    with host.connect() as other:
        command = ("sh", "-c", f"echo $$ > {pid_file}; exec sleep 30")
        other._request(lab_protocol.Run(command, None, 60_000))
        other._send(lab_protocol.Stdin(b""))
        wait_for(lambda: pid_file.exists() and pid_file.read_text())
    wait_for(lambda: not alive(int(pid_file.read_text())))


def test_spawn(agent: LabAgent, tmp_path: Path) -> None:
    output = tmp_path / "output"
    pid = agent.spawn(["sh", "-c", "echo out; echo err >&2; ps -o sid= -p $$"], output=str(output))
    wait_for(lambda: not alive(pid))
    assert output.read_text().split() == ["out", "err", str(pid)]
    with pytest.raises(LabError, match="No such file"):
        agent.spawn(["/nonexistent"])


@pytest.mark.parametrize("size", [0, 1, 258048, 258049, 5_000_000])
def test_files(agent: LabAgent, tmp_path: Path, size: int) -> None:
    local, remote, back = tmp_path / "local", tmp_path / "remote", tmp_path / "back"
    content = (BLOCK * 5)[:size]
    local.write_bytes(content)
    agent.put(local, str(remote), 0o751)
    assert remote.read_bytes() == content
    assert remote.stat().st_mode & 0o777 == 0o751
    agent.get(str(remote), back)
    assert back.read_bytes() == content


def test_put_replaces_a_running_program(agent: LabAgent, tmp_path: Path) -> None:
    program = tmp_path / "program"
    agent.put(Path("/bin/sleep"), str(program), 0o755)
    pid = agent.spawn([str(program), "20"])
    agent.put(Path("/bin/true"), str(program), 0o755)
    assert agent.run([str(program)]).status == 0
    agent.run(["kill", str(pid)])


def test_files_that_cannot_be(agent: LabAgent, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(BLOCK * 3)
    with pytest.raises(LabError, match="No such file"):
        agent.put(local, "/nonexistent/file")
    with pytest.raises(LabError, match="No such file"):
        agent.get("/nonexistent/file", tmp_path / "x")
    with pytest.raises(LabError, match="Is a directory"):
        agent.get("/", tmp_path / "x")
    with pytest.raises(LabError, match="No space"):
        agent.put(local, "/dev/full")
    with pytest.raises(LabError):
        agent.put(tmp_path / "absent", str(tmp_path / "y"))


def test_proc_files_have_no_size(agent: LabAgent, tmp_path: Path) -> None:
    agent.get("/proc/sys/kernel/ostype", tmp_path / "ostype")
    assert (tmp_path / "ostype").read_text() == "Linux\n"


def test_production_build_has_none_of_it() -> None:
    binary = build()
    content = binary.read_bytes()
    assert b"cannot run the program" not in content
    assert b"--vsock-port" in content
    refused = subprocess.run([binary, "--unix", "/x"], capture_output=True, check=False)
    assert refused.returncode == 2
