"""Package the agent for guests: its systemd unit, a cloud-init snippet, a Debian package."""

import base64
import gzip
import os
import subprocess
import tempfile
from datetime import UTC, datetime
from email.utils import format_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

from ovr.errors import LabError
from ovr.guest.compiler import build, deliver

__all__ = ["AGENT_PATH", "cloud_init", "debian_package", "unit"]

AGENT_PATH: Final = "/usr/sbin/ovr-agent"
"""Path of the agent in a guest, also in the unit."""

_UNIT_NAME: Final = "ovr-agent.service"
_UNIT_DIRECTORY: Final = "usr/lib/systemd/system"
_STRIPPED: Final = ("-static", "-s")


def unit() -> str:
    """Return the agent's systemd unit."""
    return _template(_UNIT_NAME)


def cloud_init() -> str:
    """Return a cloud-config that installs agent, unit and CRIU.

    It contains the agent (some 500 KB): for NoCloud and other data sources without a small limit.

    Raises:
        LabError: the agent cannot be built.
    """
    packed = gzip.compress(build(flags=_STRIPPED).read_bytes(), mtime=0)
    text = base64.b64encode(packed).decode()
    lines = [text[start : start + 76] for start in range(0, len(text), 76)]
    return _template("cloud-config").format(
        version=version("ovr"),
        path=AGENT_PATH,
        agent=_indented(lines),
        unit_name=_UNIT_NAME,
        unit=_indented(unit().splitlines()),
    )


def debian_package(output: Path, maintainer: str) -> Path:
    """Make ``ovr-agent_VERSION_amd64.deb``, and return its path.

    Args:
        output: its path, or a directory in which it gets its usual name.
        maintainer: the maintainer of the package, as ``NAME <ADDRESS>``.

    Raises:
        LabError: the agent cannot be built, or there is no dpkg-deb.
    """
    path = output / f"ovr-agent_{version('ovr')}_amd64.deb" if output.is_dir() else output
    with tempfile.TemporaryDirectory(prefix="ovr-deb-") as scratch:
        tree, made = Path(scratch, "tree"), Path(scratch, "made.deb")
        tree.mkdir()
        tree.chmod(0o755)
        _fill(tree, maintainer)
        command = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise LabError("dpkg-deb is not installed", "apt-get install dpkg") from None
        if done.returncode:
            raise LabError(f"dpkg-deb failed: {done.stderr.strip()}")
        deliver(made, path, 0o644)
    return path


def _fill(tree: Path, maintainer: str) -> None:
    agent = _place(tree, AGENT_PATH.removeprefix("/"), build(flags=_STRIPPED).read_bytes(), 0o755)
    _place(tree, f"{_UNIT_DIRECTORY}/{_UNIT_NAME}", unit().encode())
    documents = "usr/share/doc/ovr-agent"
    _place(tree, f"{documents}/copyright", _template("copyright").encode())
    entry = _template("changelog").format(
        version=version("ovr"), maintainer=maintainer, date=format_datetime(_date())
    )
    _place(tree, f"{documents}/changelog.gz", gzip.compress(entry.encode(), mtime=0))
    control = _template("control").format(
        version=version("ovr"), maintainer=maintainer, size=agent.stat().st_size // 1024 + 16
    )
    _place(tree, "DEBIAN/control", control.encode())
    for script in ("postinst", "prerm", "postrm"):
        _place(tree, f"DEBIAN/{script}", _template(script).encode(), 0o755)


def _place(tree: Path, name: str, content: bytes, mode: int = 0o644) -> Path:
    path = tree / name
    for parent in reversed(path.relative_to(tree).parents[:-1]):
        (tree / parent).mkdir(mode=0o755, exist_ok=True)
        os.chmod(tree / parent, 0o755)  # noqa: PTH101 - independent of the umask
    path.write_bytes(content)
    path.chmod(mode)
    return path


def _date() -> datetime:
    # https://reproducible-builds.org/specs/source-date-epoch; dpkg-deb uses it too.
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    return datetime.fromtimestamp(float(epoch), UTC) if epoch else datetime.now(UTC)


def _template(name: str) -> str:
    return (Path(__file__).with_name("packaging") / name).read_text()


def _indented(lines: list[str]) -> str:
    return "\n".join(f"      {line}".rstrip() for line in lines)
