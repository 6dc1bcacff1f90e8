"""Stand-ins for podman and runc that dump the tree of `dump_host`, for the agent of `agent_host`.

They start CRIU as podman and runtimes do: found by PATH, through a runtime that inherits nothing
but that, in the container's directory.
"""

import io
import json
import os
import tarfile
from pathlib import Path

from ovr.guest.client.results import HeldTree
from ovr.lab.agent import LabAgent
from tests.unit.agent_host import PYTHON, AgentHost, wait_for
from tests.unit.dump_host import Images, Tree, options, shut_gate
from tests.unit.dump_host import dump as dump_process

ID = "c0ffee" * 10 + "abcd"

_ENGINE = """#!{python} -Ss
import io, json, os, subprocess, sys, tarfile, time

directory, criu = {directory!r}, {criu!r}
words = sys.argv[1:]
options = dict(zip(words, words[1:]))
with open(directory + "/containers.json") as file:
    pids = json.load(file)
if "inspect" in words or words[0] == "state":
    if words[-1] not in pids:
        print("Error: no such container", words[-1], file=sys.stderr)
        raise SystemExit(125)
    state = dict(Status="running", Pid=pids[words[-1]])
    if "inspect" in words:
        print(json.dumps(dict(id={id!r}, state=state)))
    else:
        print(json.dumps(dict(id=words[-1], status="running", pid=state["Pid"])))
    raise SystemExit
if words[:2] == ["container", "rm"]:
    with open(directory + "/removals", "a") as file:
        print(*words, file=file)
    mode = "wait"
    while mode in ("wait", ""):
        time.sleep(0.01)
        with open(directory + "/remove-mode") as file:
            mode = file.read()
    if mode == "fail":
        print("first", "Error: its storage is busy", sep="\\n", file=sys.stderr)
        raise SystemExit(125)
    if mode == "hang":
        time.sleep(600)
    for pid in pids.values() if mode == "ok" else []:
        os.kill(pid, 9)
    raise SystemExit
mode = options["--mode"]
if "container" in words:
    assert words[:5] == ["container", "checkpoint", "--compress", "none", "--export"], words
    work = directory + "/containers/" + {id!r} + "/userdata"
    images, parent = work + "/checkpoint", []
    os.makedirs(images, exist_ok=True)
else:
    assert words[0] == "checkpoint", words
    work, images = options["--work-path"], options["--image-path"]
    parent = ["--track-mem", "--prev-images-dir", options["--parent-path"]]
with open(images + "/descriptors.json", "w") as file:
    file.write("[]")
command = ["criu", "dump", "-W", work, "-D", images, "-o", "dump.log", "--engine", "1", *parent]
if mode == "no-wrapper":
    command[0] = criu
for name in ("--mode", "--gate", "--kib"):
    command += [name, options[name]]
command += ["--leave-running"] * ("--leave-running" in words) + ["-t", str(pids[words[-1]])]
runtime = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
env = dict(PATH=os.environ["PATH"])
if subprocess.run([{python!r}, "-Sc", runtime, *command], cwd=work, env=env).returncode:
    print("Error: OCI runtime error: CRIU failed", file=sys.stderr)
    raise SystemExit(125)
if mode == "fail-export":
    print("Error: no space left on device", file=sys.stderr)
    raise SystemExit(125)
if "container" in words:
    with open(options["--export"], "r+b", buffering=0) as file:
        with tarfile.open(fileobj=file, mode="w|") as tar:
            if mode in ("wait-export", "hang-export", "wait-fail-export"):
                tar.addfile(tarfile.TarInfo("first" * 20))
                file.write(tar.fileobj.buf)
                tar.fileobj.buf = b""
                open(options["--gate"] + "/at-export", "w").close()
                while mode == "hang-export" or not os.path.exists(options["--gate"] + "/open"):
                    time.sleep(0.01)
            if mode == "wait-fail-export":
                print("Error: no space left on device", file=sys.stderr)
                raise SystemExit(125)
            for name in ("config.dump", "spec.dump", "large"):
                info = tarfile.TarInfo(name)
                info.size = int(options["--kib"]) << 10 if name == "large" else 2
                tar.addfile(info, io.BytesIO(b"{{}}".ljust(info.size)))
            tar.add(images, "checkpoint")
    print(words[-1])
"""


def install(host: AgentHost, tree: Tree, name: str = "web") -> None:
    """Put the stand-ins into the PATH of the host's agent; the tree is the container `name`."""
    (host.directory / "containers.json").write_text(json.dumps({name: tree.process.pid}))
    for engine in ("podman", "runc"):
        program = host.directory / engine
        names = {"directory": str(host.directory), "criu": str(host.directory / "criu"), "id": ID}
        program.write_text(_ENGINE.format(python=str(PYTHON), **names))
        program.chmod(0o755)
    choose_removal(host, "ok")


def choose_removal(host: AgentHost, mode: str) -> None:
    """Have podman remove containers: ok, fail, hang, wait for another choice, or do nothing."""
    (host.directory / "remove-mode").write_text(mode)


def removals(host: AgentHost) -> list[str]:
    """The command lines with which podman was to remove containers."""
    path = host.directory / "removals"
    return path.read_text().splitlines() if path.exists() else []


def dump(
    host: AgentHost, agent: LabAgent, tree: Tree, images: Images | None = None, mode: str = "ok",
    *, engine: str = "podman", name: str = "web", kib: int = 4, pid: int | None = None,
    leave_running: bool = False, silence: float = 10.0, stall: float = 60.0,
) -> HeldTree:  # fmt: skip
    """Have the stand-ins dump the container and hold it."""
    images = Images() if images is None else images
    return dump_process(
        agent, tree.process.pid if pid is None else pid, images.save,
        criu_options=options(host, mode, kib), leave_running=leave_running, silence=silence,
        stall=stall, engine=engine, name=name,
    )  # fmt: skip


def checkpoint_of(host: AgentHost) -> Path:
    """The directory of podman's in which the stand-in for CRIU works."""
    return host.directory / "containers" / ID / "userdata" / "checkpoint"


def members(archive: bytes) -> list[str]:
    """The names in an archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getnames()


def assert_unharmed(host: AgentHost, tree: Tree) -> None:
    """The container runs, nothing is left of the dump, and the next one succeeds."""
    wait_for(lambda: tree.tracers() == {0})
    assert tree.runs()
    wait_for(lambda: not host.restores)
    assert not checkpoint_of(host).exists()
    wait_for(lambda: os.sched_getscheduler(host.process.pid) == os.SCHED_OTHER)
    shut_gate(host)
    archive: list[bytes] = []
    with host.connect() as other:
        dump(host, other, tree, leave_running=True)
        other.end_dump(archive.append)
    assert "config.dump" in members(b"".join(archive))
    assert tree.runs()
