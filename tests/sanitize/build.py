"""A copy of the tree, its extension and a Python, with AddressSanitizer and UBSan."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

__all__ = ["BUILD", "ROOT", "build_tree"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "sanitize"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
COPIED = ("ovr", "tests", "bench", "docs", "examples")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "Makefile")


def build_tree() -> tuple[Path, Path]:
    """Return the copy of the tree and the Python that runs it."""
    tree = BUILD / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_fastcopy.c")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in FILES:
        shutil.copyfile(ROOT / name, tree / name)
    run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree,
        env={**os.environ, "OVR_SANITIZE": "1"},
    )  # fmt: skip
    return tree, build_python()


def build_python() -> Path:
    """A virtual environment with this one's packages and a Python of `python.c`."""
    place = BUILD / "venv"
    shutil.rmtree(place, ignore_errors=True)
    (place / "bin").mkdir(parents=True)
    python = place / "bin" / "python"
    flags = sysconfig.get_config_vars("LIBDIR", "LIBPL", "LIBS", "SYSLIBS", "LDVERSION")
    libdir, libpl, libs, syslibs, version = map(str, flags)
    run(
        ["gcc", *SANITIZERS, f"-I{sysconfig.get_path('include')}", str(HERE / "python.c"),
         f"-L{libdir}", f"-L{libpl}", f"-Wl,-rpath,{libdir}", "-Wl,-E", f"-lpython{version}",
         *libs.split(), *syslibs.split(), "-o", str(python)]
    )  # fmt: skip
    command = place / "bin" / "ovr"
    command.write_text(f'#!/bin/sh\nexec {python} -m ovr "$@"\n')
    command.chmod(0o755)
    shutil.copyfile(Path(sys.prefix) / "pyvenv.cfg", place / "pyvenv.cfg")
    packages = place.joinpath(*Path(sysconfig.get_path("purelib")).relative_to(sys.prefix).parts)
    packages.parent.mkdir(parents=True)
    packages.symlink_to(sysconfig.get_path("purelib"))
    return python


def run(command: list[str], **options: object) -> None:
    """Run a program that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
