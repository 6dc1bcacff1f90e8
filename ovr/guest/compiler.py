"""Compile the guest agent on the host."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ovr.errors import LabError
from ovr.guest.wire import header
from ovr.host import cure_of, locate
from ovr.host.user_cache import own_cache

__all__ = ["SANITIZED", "build", "deliver"]

_SOURCES = Path(__file__).parent
_CFLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror")
_STATIC = ("-static",)
SANITIZED = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-static-libasan",
    "-static-libubsan",
)
"""Linked with the guest's C library, and statically with the sanitizers, which it may lack."""
_LIBRARY_SOURCES = _SOURCES / "warm"
# Loaded into the guest's CRIU, whose libc is unknown: it uses none.
_LIBRARY_FLAGS = (
    "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-nostdlib",
    "-fvisibility=hidden", "-fno-stack-protector", "-fno-tree-loop-distribute-patterns",
    "-fcf-protection=none", "-Wl,-z,now,-z,noexecstack,--build-id=none", "-s",
)  # fmt: skip
_INSTALL = "apt-get install gcc libc6-dev"


def build(*, lab: bool = False, flags: Sequence[str] | None = None) -> Path:
    """Compile the agent for guests with this machine's architecture; cached by its sources.

    Args:
        lab: include the part that runs commands and copies files.
        flags: additional flags to compile and link with; default: static linking or, with
            ``OVR_SANITIZE`` in the environment, sanitizers.

    Raises:
        LabError: no compiler, no C library to link with, or an error in the sources.
    """
    if flags is None:
        flags = SANITIZED if os.environ.get("OVR_SANITIZE") else _STATIC
    sources = sorted(_SOURCES.glob("*.c"))
    command = ["gcc", *_CFLAGS, *(["-DOVR_LAB"] if lab else []), *flags]
    # Root of the guest runs the file, so no other user may be able to put one there.
    target = own_cache("agent") / f"ovr-agent-{_digest(command)}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(prefix="ovr-agent-") as scratch:
        Path(scratch, "protocol.h").write_text(header())
        library = Path(scratch, "library.so")
        parts = sorted(_LIBRARY_SOURCES.glob("*.c"))
        _compile(["gcc", *_LIBRARY_FLAGS, *map(str, parts), "-o", str(library)])
        Path(scratch, "warm_library.h").write_text(_as_array("warm_library", library.read_bytes()))
        binary = Path(scratch, "ovr-agent")
        _compile([*command, f"-I{scratch}", *map(str, sources), "-o", str(binary)])
        # Another process may have built it meanwhile, and run it: an agent whose program file is
        # replaced refuses to start CRIU.
        if not target.exists():
            deliver(binary, target, 0o755)
    return target


def deliver(made: Path, target: Path, mode: int) -> None:
    """Copy a finished file to its target path atomically.

    Raises:
        LabError: it cannot be written, or another user controls the path.
    """
    try:
        directory, name = locate(target)
        with (
            directory,
            made.open("rb") as source,
            directory.replacement(name, mode, in_place=True) as fresh,
        ):
            shutil.copyfileobj(source, fresh.file)
            fresh.put()
    except OSError as error:
        hint = cure_of(error, "name another path with -o")
        raise LabError(f"{target} cannot be written: {error.strerror}", hint) from error


def _compile(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LabError("no C compiler to build the guest agent with", _INSTALL) from None
    if done.returncode != 0:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), "")
        raise LabError(f"gcc cannot build the guest agent: {complaint.strip()}", _INSTALL)


def _as_array(name: str, content: bytes) -> str:
    return f"static const unsigned char {name}[] = {{{','.join(map(str, content))}}};\n"


def _digest(command: Sequence[str]) -> str:
    digest = hashlib.sha256("\0".join([*command, *_LIBRARY_FLAGS, header()]).encode())
    for source in sorted([*_SOURCES.rglob("*.c"), *_SOURCES.rglob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]
