"""The sdist and the wheel, installed into an empty environment."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile

from tests.conftest import ROOT, unpacked

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


def run(program, *words):
    return subprocess.run(
        [program, *words], capture_output=True, text=True, check=True, cwd="/"
    ).stdout


def test_sdist(sdist, tmp_path):
    source = unpacked(sdist, tmp_path)
    assert (source / "ovr" / "_fastcopy.pyx").exists()
    assert (source / "ovr" / "native" / "ram.pxi").exists()
    assert not (source / "ovr" / "_fastcopy.c").exists()
    assert (source / "docs" / "ovr.8").exists()
    assert (source / "examples" / "restore.sh").exists()


def test_wheel(wheel):
    python = f"cp3{sys.version_info.minor}"
    assert wheel.name == f"ovr-{VERSION}-{python}-{python}-linux_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "ovr").rglob("*")
               if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    native = re.compile(r"\.so$|_fastcopy\.(c|pyx)$|/native/")
    wanted = {name for name in tracked if not native.search(name)}
    wanted |= {"ovr/py.typed", "ovr/_fastcopy.pyi"}
    assert wanted <= names
    assert not [name for name in names if name.endswith((".pyx", ".pxi", "_fastcopy.c"))]
    assert not [name for name in names if name.split("/")[0] in ("tests", "bench")]
    assert f"ovr-{VERSION}.data/data/share/man/man8/ovr.8" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_program(installed):
    assert run(installed / "ovr", "--version") == f"ovr {VERSION}\n"
    states = json.loads(run(installed / "ovr", "states", "--json"))["states"]
    assert sum(state["outside"] for state in states) > 20
    where = run(installed / "python", "-c", "import ovr._fastcopy as m; print(m.__file__)")
    assert where.startswith(str(installed.parent))


def test_what_it_depends_on_is_declared(installed):
    """Every module can be imported with nothing but the declared dependencies there."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "ovr").rglob("*.py")
        if path.name not in ("__main__.py", "__init__.py")
    )
    program = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    run(installed / "python", "-c", program)


def test_the_guests_agent_is_built_from_the_wheel(installed, tmp_path):
    run(installed / "ovr", "agent", "deb", "-o", tmp_path)
    [deb] = tmp_path.iterdir()
    assert deb.stat().st_size > 100_000


def test_types_come_with_it(installed, tmp_path):
    """A type checker that sees the installed package alone finds its types."""
    program = tmp_path / "program.py"
    program.write_text(
        "import ovr\n"
        "from ovr._fastcopy import RamMap\n"
        "with ovr.attach('qmp:/x') as vm:\n"
        "    reveal_type(vm.restore('images').pid)\n"
        "reveal_type(RamMap.translate)\n"
    )
    options = ["--python-executable", installed / "python", "--strict", "--cache-dir", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, program],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert 'Revealed type is "int"' in done.stdout.replace("builtins.", "")
    assert "def (self: ovr._fastcopy.RamMap" in done.stdout
    assert "error" not in done.stdout


def test_versions_agree():
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## ({re.escape(VERSION)}|Unreleased)", changes, re.MULTILINE)
    sources = [path.read_text() for path in (ROOT / "ovr" / "guest").glob("*.[ch]")]
    [agent] = {found for text in sources for found in re.findall(r'"(\d+\.\d+\.\d+)"', text)}
    assert agent == VERSION
