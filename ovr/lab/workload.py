"""The program that demo and tests dump and restore, built on the host (`workload.c`)."""

from pathlib import Path

from ovr.lab.cache import cached, digest
from ovr.lab.tools import need_tool, run_tool

__all__ = ["build_workload"]

_SOURCE = Path(__file__).with_name("workload.c")
_CFLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static")


def build_workload(source: Path = _SOURCE) -> Path:
    """Compile a static program for the guest; cached by its source.

    Raises:
        LabError: there is no compiler, or it refuses the source.
    """

    def compile_it(directory: Path) -> None:
        run_tool([need_tool("gcc", "gcc"), *_CFLAGS, str(source), "-o", str(directory / "program")])

    entry = cached(f"program-{digest(source.read_bytes(), *_CFLAGS)}", compile_it)
    return entry / "program"
