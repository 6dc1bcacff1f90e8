"""The directory that a dump writes its images to."""

import stat
from pathlib import Path

import pytest

from ovr.dump.output import DESCRIPTORS, INVENTORY, PRE_COPY, Output
from ovr.errors import (
    AgentUnreachable,
    ArchiveFailed,
    AttemptFailed,
    CheckFailed,
    OvrError,
    TreeDamaged,
    UsageError,
)


def modes(path: Path) -> dict[str, int]:
    return {
        str(one.relative_to(path)): stat.S_IMODE(one.lstat().st_mode)
        for one in path.rglob("*")
        if not one.is_symlink()
    }


@pytest.mark.parametrize("user_namespace", [False, True])
def test_who_can_read_the_images(tmp_path, user_namespace):
    """CRIU restores a tree with a user namespace as the root of that namespace: all have to."""
    tmp_path.chmod(0o755)
    names = {"pages-1.img", INVENTORY, *(["userns-9.img"] if user_namespace else [])}
    with Output(tmp_path) as output:
        for name in names:
            output.images.write(name, b"data")
        output.next_parent().write("pages-1.img", b"earlier")
        inside = modes(tmp_path)
        assert all(not mode & 0o077 for mode in inside.values())
        with output.committing():
            pass
    file, directory = (0o644, 0o755) if user_namespace else (0o600, 0o700)
    assert modes(tmp_path) == {
        **dict.fromkeys(names, file), f"{PRE_COPY}1": directory, f"{PRE_COPY}1/pages-1.img": file
    }  # fmt: skip


def test_images_of_a_container_that_has_ended_stay(tmp_path):
    """Its runtime failed after CRIU: nothing else has its memory."""
    with pytest.raises(ArchiveFailed) as caught, Output(tmp_path) as output:
        output.images.write(INVENTORY, b"data")
        with output.committing():
            output.end(Agent(ArchiveFailed("runc in the guest failed")))
    assert str(tmp_path) in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == [INVENTORY]


class Agent:
    """Fails to end the dump."""

    def __init__(self, error: OvrError) -> None:
        self._error = error

    def end_dump(self) -> bytes:
        raise self._error


@pytest.mark.parametrize(
    ("told", "error", "left"),
    [
        pytest.param(False, CheckFailed("the VM migrates"), [], id="it was not told to end"),
        pytest.param(True, AttemptFailed("aborted"), [], id="it runs on"),
        pytest.param(True, AgentUnreachable("broken"), [INVENTORY], id="not known"),
        pytest.param(True, TreeDamaged("killed"), [INVENTORY], id="ended in part"),
    ],
)
def test_images_stay_unless_the_tree_runs_on(tmp_path, told, error, left):
    with pytest.raises(type(error)), Output(tmp_path) as output:
        output.images.write(INVENTORY, b"data")
        with output.committing():
            if told:
                output.end(Agent(error))
            raise error
    assert [path.name for path in tmp_path.iterdir()] == left


def test_a_directory_with_a_containers_descriptors(tmp_path):
    (tmp_path / DESCRIPTORS).touch()
    with pytest.raises(UsageError, match="has images already"):
        Output(tmp_path)
