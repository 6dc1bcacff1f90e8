"""The program that demo and tests dump and restore, built on the host (`workload.c`)."""

from pathlib import Path

from ovr.lab.cache import cached, digest
from ovr.lab.tools import need_tool, run_tool

__all__ = ["build_workload"]

_SOURCE = Path(__file__).with_name("workload.c")
_CFLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static")


def build_workload(source: Path = _SOURCE, *flags: str) -> Path:
    """Compile a static program for the guest; cached by its sources.

    Args:
        source: one C file, or a directory of C files and their headers.
        flags: for the compiler, besides the usual ones.

    Raises:
        LabError: there is no compiler, or it refuses the source.
    """
    files = sorted(source.glob("*.[ch]")) if source.is_dir() else [source]

    def compile_it(directory: Path) -> None:
        target = str(directory / "program")
        units = [str(file) for file in files if file.suffix == ".c"]
        run_tool([need_tool("gcc", "gcc"), *_CFLAGS, *flags, *units, "-o", target])

    contents = [file.read_bytes() for file in files]
    entry = cached(f"program-{digest(*contents, *_CFLAGS, *flags)}", compile_it)
    return entry / "program"
