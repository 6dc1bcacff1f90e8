import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from ovr.lab.agent import LabAgent
from tests.unit.agent_host import AgentHost, agent_host

# Tests never judge times: this machine has other things to do.
settings.register_profile("ovr", deadline=None)
settings.load_profile("ovr")

DATA = Path(__file__).parent / "images" / "data"
SUITES = ("bookworm", "trixie", "forky")


@pytest.fixture(scope="session", params=SUITES)
def dumps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real dumps of one CRIU generation (see data/README.md); not to be changed."""
    where = tmp_path_factory.mktemp(request.param)
    with tarfile.open(DATA / f"{request.param}.tar.xz") as archive:
        archive.extractall(where, filter="data")
    return where


@pytest.fixture(scope="session")
def crit(dumps: Path) -> dict[str, list[dict[str, Any]]]:
    """The images as decoded by crit, by path below `dumps`."""
    loaded: dict[str, list[dict[str, Any]]] = json.loads((dumps / "crit.json").read_text())
    return loaded


@pytest.fixture
def one(dumps: Path, tmp_path: Path) -> Path:
    """A copy of the single-process dump, to be damaged."""
    return Path(shutil.copytree(dumps / "one", tmp_path / "one", symlinks=True))


@pytest.fixture
def tree(dumps: Path, tmp_path: Path) -> Path:
    """A copy of the dump of a parent, a child and a zombie, to be damaged."""
    return Path(shutil.copytree(dumps / "tree", tmp_path / "tree", symlinks=True))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[AgentHost]:
    """An agent on this machine."""
    with agent_host(tmp_path) as host:
        yield host


@pytest.fixture(params=[False, True], ids=["stream", "serial"])
def agent(host: AgentHost, request: pytest.FixtureRequest) -> Iterator[LabAgent]:
    """A session with it, over each kind of link."""
    with host.connect(serial=request.param) as agent:
        yield agent
