"""Builds with sanitizers: the agent's parts as libFuzzer programs, and the extension."""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovr.guest.wire import header

__all__ = ["C_TARGETS", "CTarget", "build_extension", "build_program"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GUEST = ROOT / "ovr" / "guest"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COMMON = ("-O1", "-g", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Werror", *SANITIZERS)
SMALL = {"MAX_FRAME": 2048, "SYNC_ZEROS": 2048 + 64, "MAX_FILES": 8, "MAX_IMAGE_BYTES": 4096}
"""Limits that an input of a few thousand bytes reaches, in the place of the protocol's own."""


@dataclass(frozen=True)
class CTarget:
    """A target in C.

    Attributes:
        source: the file in `c/` with its entry point.
        parts: what else it is made of: files of `c/` and of the agent.
        limits: other limits than the protocol's.
        longest: most bytes of an input.
    """

    source: str
    parts: Sequence[str]
    limits: Mapping[str, int]
    longest: int = 4096

    def sources(self) -> list[Path]:
        """All files to compile."""
        return [HERE / "c" / self.source, *(ROOT / part for part in self.parts)]


MESSAGES = ("tests/fuzz/c/use.c", "ovr/guest/message.c", "ovr/guest/msgpack.c")
C_TARGETS = {
    "agent-message": CTarget("message.c", MESSAGES, {}, longest=1 << 14),
    "agent-ranges": CTarget("populate.c", (*MESSAGES, "ovr/guest/touch.c", "ovr/guest/oom.c"), {}),
    "agent-images": CTarget("images.c", ("ovr/guest/images.c",), SMALL),
    "agent-restore": CTarget("restore.c", MESSAGES, {}, longest=512),
    "agent-session": CTarget("session.c", MESSAGES, SMALL),
}


def build_program(target: CTarget, directory: Path, *, guided: bool = True) -> Path:
    """Compile a target in C; returns the program.

    Args:
        target: the target.
        directory: where to.
        guided: for libFuzzer, with clang; else for gcc with the entry point of ``c/main.c``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = header()
    for name, value in target.limits.items():
        text, found = re.subn(rf"(?m)^#define {name} \d+$", f"#define {name} {value}", text)
        assert found == 1, name
    (directory / "protocol.h").write_text(text)
    program = directory / "fuzz"
    includes = [f"-I{place}" for place in (directory, HERE / "c", GUEST)]
    sources = [str(source) for source in target.sources()]
    compiler = ["clang", "-fsanitize=fuzzer"] if guided else ["gcc", str(HERE / "c" / "main.c")]
    _run([*compiler, "-std=c11", "-D_GNU_SOURCE", *COMMON, *includes, *sources, "-o", str(program)])
    return program


def build_extension(directory: Path) -> Path:
    """Compile the extension for libFuzzer's eyes and with sanitizers; returns the module."""
    from Cython.Build.Cythonize import main as cythonize  # noqa: PLC0415 - slow to import

    directory.mkdir(parents=True, exist_ok=True)
    module = directory / "_fastcopy.so"
    source = directory / "ovr" / "_fastcopy.pyx"
    source.parent.mkdir(exist_ok=True)
    (source.parent / "__init__.py").touch()
    source.write_bytes((ROOT / "ovr" / "_fastcopy.pyx").read_bytes())
    shutil.copytree(ROOT / "ovr" / "native", source.parent / "native", dirs_exist_ok=True)
    cythonize(["-q", "-3", str(source)])
    generated = (
        "-Wno-unused-parameter",
        "-Wno-missing-field-initializers",
        "-Wno-cast-function-type",
    )
    _run(
        ["clang", "-shared", "-fPIC", "-pthread", *COMMON, *generated, "-Wno-unused-function",
         "-Wno-unreachable-code-fallthrough", "-fsanitize=fuzzer-no-link",
         f"-I{ROOT / 'ovr' / 'native'}", f"-I{sysconfig.get_path('include')}",
         str(source.with_suffix(".c")), "-o", str(module)]
    )  # fmt: skip
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
