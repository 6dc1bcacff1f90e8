"""CRIU on bare metal: Debian trixie's CRIU on this very host, on the images that the guest made.

The host's own CRIU may be too old for the host's kernel (4.1 is needed from Linux 6.13 on), so it
is the one of the lab's guest image, with its own loader and libraries. It runs in namespaces of
its own, where pids are free, the workload's program is where the images say it is, and `/run` is a
tmpfs, in which CRIU keeps what it knows of the kernel. The images are the guest's own files; only
capabilities that nobody can have here are taken out of the core images.

    python -m bench.bare IMAGES PROGRAM ROOT

is the process inside: for each line that it reads it restores, and prints seconds and outcome.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.race import Measures
from ovr.images import ImageSet
from ovr.images.framing import encode, image_bytes
from ovr.images.messages import CoreEntry
from ovr.images.wire import copy_of
from ovr.lab.cache import cached, digest
from ovr.lab.image import guest_image
from ovr.lab.tools import need_tool, run_tool

LIBRARIES = "x86_64-linux-gnu"
LOADER = "ld-linux-x86-64.so.2"


class CannotRun(Exception):
    """Why CRIU cannot run on this host."""


class Bare:
    """CRIU on this host, ready to restore one set of images; a context manager.

    Args:
        images: that the guest's CRIU wrote; they are not changed.
        program: the workload's program, and `path` where the images have it.
        pid: of the process.
        scratch: an empty directory on the same file system as `images`.

    Raises:
        CannotRun: not root, or not with this kernel.
    """

    def __init__(self, images: Path, program: Path, path: str, pid: int, scratch: Path) -> None:
        if os.geteuid() != 0:
            raise CannotRun("CRIU on bare metal needs root")
        _prepare_images(images, scratch)
        self.version = _version()
        command = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            sys.executable,
            "-m",
            "bench.bare",
            str(scratch),
            str(program),
            path,
            str(pid),
        ]
        self._inside = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent.parent,
        )  # fmt: skip

    def __enter__(self) -> "Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self._inside.stdin.close()
        self._inside.wait()
        self._inside.stdout.close()

    def run(self) -> Measures:
        """Restore and end the process again; only the restore is measured.

        Raises:
            CannotRun: CRIU fails.
        """
        self._inside.stdin.write("restore\n")
        self._inside.stdin.flush()
        line = self._inside.stdout.readline()
        answer = json.loads(line or '{"error": "it has ended"}')
        if "error" in answer:
            raise CannotRun(f"CRIU {self.version} on this host: {answer['error']}")
        return answer


def _command() -> list[str]:
    root = cached(f"criu-{digest(guest_image('trixie').disk.parent.name)}", _take)
    return [str(root / LOADER), "--library-path", str(root), str(root / "criu")]


def _take(work: Path) -> None:
    # debugfs reads the guest's disk without mounting it.
    disk = guest_image("trixie").disk
    everything = work / "everything"
    everything.mkdir()
    debugfs = need_tool("debugfs", "e2fsprogs")
    wanted = f"rdump /usr/lib/{LIBRARIES} /usr/sbin/criu {everything}"
    run_tool([debugfs, "-R", wanted, str(disk)])
    libraries = everything / LIBRARIES
    needed = subprocess.run(
        [libraries / LOADER, "--library-path", libraries, "--list", everything / "criu"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = {Path(path).name for path in re.findall(r"=> (\S+)", needed)}
    for source in (everything / "criu", *(libraries / name for name in {*names, LOADER})):
        shutil.copy(source, work / source.name)
    shutil.rmtree(everything)


def _version() -> str:
    done = subprocess.run([*_command(), "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"^Version: (\S+)", done.stdout, re.MULTILINE)
    if not found:
        raise CannotRun(f"CRIU does not start: {done.stderr.strip()[-200:]}")
    return found[1]


def _prepare_images(images: Path, scratch: Path) -> None:
    bounding = re.search(r"CapBnd:\s*(\w+)", Path("/proc/self/status").read_text())[1]
    with ImageSet.open(images) as image_set:
        for name in image_set.names:
            if not name.startswith("core-"):
                (scratch / name).symlink_to(images / name)
                continue
            entries = [copy_of(entry) for entry in image_set.entries(name, CoreEntry)]
            for entry in entries:
                _bound(entry.thread_core.creds, int(bounding, 16))
            (scratch / name).write_bytes(image_bytes(name, map(encode, entries)))


def _bound(creds, bounding: int) -> None:
    for field in ("cap_inh", "cap_prm", "cap_eff", "cap_bnd"):
        words = getattr(creds, field)
        for i in range(len(words)):
            words[i] &= bounding >> (32 * i) & 0xFFFFFFFF


# ------------------------------------------------------------------------ inside


@contextlib.contextmanager
def _place(program: str, path: str) -> Iterator[None]:
    # Only this mount namespace sees it.
    for directory in ("/run", str(Path(path).parent)):
        subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    shutil.copy2(program, path)
    Path(path).chmod(0o755)
    yield


def _restore(images: str, pid: int) -> dict[str, object]:
    command = [*_command(), "restore", "-d", "-D", images, "-o", "/run/restore.log"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        log = Path("/run/restore.log")
        lines = log.read_text(errors="replace").splitlines() if log.exists() else [done.stderr]
        errors = [line for line in lines if "Error" in line]
        return {"error": (errors or lines or ["it says nothing"])[-1]}
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)  # it is ours: we are the init of this namespace
    return {"seconds": seconds}


def main() -> None:
    images, program, path, pid = sys.argv[1:]
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    with _place(program, path):
        for _ in sys.stdin:
            print(json.dumps(_restore(images, int(pid))), flush=True)


if __name__ == "__main__":
    main()
