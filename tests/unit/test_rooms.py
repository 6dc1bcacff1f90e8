"""Imports point one way: docs/architecture.md, section 2, held by a test."""

import ast
from pathlib import Path

import pytest

import ovr

ROOT = Path(ovr.__file__).parent

# From the top down; a module may import its own room and rooms below it.
LAYERS = (
    {"__main__", "cli"},
    {"demo"},
    {"lab"},
    {"__init__", "api"},
    {"restore"},
    {"checkpoint"},
    {"outside"},
    {"plan"},
    {"warm_plan"},
    {"warm_areas"},
    {"memory_plan"},
    {"cow_plan"},
    {"state", "placement", "report", "journal"},
    {"vm"},
    {"images", "kernel"},
    {"guest"},
    {"paging", "ranges"},
    {"ram"},
    {"_fastcopy"},
    {"standby"},
    {"addresses", "credentials", "errors", "files", "user_cache"},
)
# Same height, but strangers to each other.
FORBIDDEN = {("images", "kernel"), ("kernel", "images"), ("images", "paging"), ("images", "ram")}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path):
    package = [ROOT.name, *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ovr")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "ovr":
                yield from (f"ovr.{alias.name}" for alias in node.names)
            elif module.startswith("ovr."):
                yield module


def height(name: str) -> int:
    return next(level for level, rooms in enumerate(LAYERS) if name in rooms)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[0]
    for module in imports(path):
        other = room(module)
        if own in ("__init__", other):
            continue
        if not (ROOT / other).exists() and not list(ROOT.glob(f"{other}.p*")):
            other = "__init__"  # a name that ovr itself exports
        assert height(own) <= height(other), f"{path.name} imports {module}"
        assert (own, other) not in FORBIDDEN
