"""Fixtures: the sdist, the wheel that is built of it, an empty environment that has the wheel."""

import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pip(*words, **environment):
    """Run this environment's pip, which has what a build needs."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, words)]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """Made of what is committed or will be, without what builds have left in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    program = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", program], cwd=tree, capture_output=True, check=True)
    [path] = (tree / "dist").iterdir()
    return path


def unpacked(sdist, directory):
    with tarfile.open(sdist) as tar:
        tar.extractall(directory, filter="data")
    [source] = directory.iterdir()
    return source


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """A wheel of the sdist: nothing of the tree gets in, nothing can be missing.

    Its extension is not optimized, which takes most of the time of a build.
    """
    directory = tmp_path_factory.mktemp("wheel")
    compiler = directory / "cc"
    compiler.write_text('#!/bin/sh\nexec gcc "$@" -O0\n')
    compiler.chmod(0o755)
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", directory)
    pip("wheel", *options, unpacked(sdist, directory / "source"), CC=str(compiler))
    [built] = directory.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A new environment with the wheel and what it depends on; gives its directory of programs."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place)
    pip("--python", place, "install", "--no-compile", wheel)
    return place / "bin"
