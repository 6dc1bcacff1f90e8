"""Programs of the host that the lab runs, with errors that name the package to install."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ovr.errors import LabError

__all__ = ["mmdebstrap", "need_tool", "run_tool"]


def need_tool(program: str, package: str) -> str:
    """Return the path of a program of the host.

    Raises:
        LabError: it is not installed; the hint is the command that installs it.
    """
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/libexec")
    if path is None:
        raise LabError(f"{program} is not installed", f"apt-get install {package}")
    return path


def run_tool(command: Sequence[str]) -> None:
    """Run a program to its end.

    Raises:
        LabError: it failed; the message has its last line, or the first that it marks as an error:
            those after it are consequences.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LabError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        problems = [line for line in lines if line.startswith("E:")] or lines[-1:]
        raise LabError(f"{Path(command[0]).name} failed: {problems[0]}")


def mmdebstrap(
    suite: str,
    variant: str,
    packages: Sequence[str],
    target: Path,
    *,
    release: str = "",
    script: str = "",
) -> None:
    """Write a tar archive `target` of a Debian suite; mmdebstrap has mirrors and keys.

    Args:
        suite: such as ``trixie``.
        variant: mmdebstrap's: ``minbase`` installs, ``extract`` only unpacks.
        packages: packages to install, with their dependencies.
        target: the archive to write.
        release: another one on top of the suite that packages may come from, such as
            ``trixie-backports``; its name is a plain word.
        script: shell that runs on the host when the packages are unpacked; ``$1`` is the root of
            the new system, and apt asks its sources.

    Raises:
        LabError: a tool is missing, or packages cannot be fetched.
    """
    program = need_tool("mmdebstrap", "mmdebstrap")
    if os.geteuid() != 0:
        need_tool("newuidmap", "uidmap")  # it then works in a user namespace
    options = [f"--variant={variant}", "--format=tar"]
    if packages:
        options.append(f"--include={','.join(packages)}")
    if release not in ("", suite):
        # Its mirror is the suite's, unless mmdebstrap has listed it already (security).
        add = (
            f"cd \"$1/etc/apt\"; grep -q ' {release} ' sources.list ||"
            f" sed -n 's/ {suite} / {release} /p' sources.list > sources.list.d/0release.list"
        )
        options.append(f"--setup-hook={add}")
    if script:
        options.append(f'--extract-hook=export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"; {script}')
    run_tool(
        [program, *options,
         # Snapshot mirrors have Release files that have expired.
         '--aptopt=Acquire::Check-Valid-Until "false"',
         "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
         # Some packages link their man pages when configured, even if the pages are missing.
         "--dpkgopt=path-include=/usr/share/man/man?",
         "--dpkgopt=path-exclude=/usr/share/locale/*", suite, str(target)]
    )  # fmt: skip
