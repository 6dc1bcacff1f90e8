"""Images that the host does not let us read are not damaged: each cause has its own cure."""

import errno
import os
from contextlib import contextmanager

import pytest

from ovr import cli
from ovr.errors import ImagesDamaged, ImagesForbidden, ImagesUnreachable, ImagesUnsupported
from ovr.images import ImageSet
from ovr.images.framing import encode, image_bytes
from ovr.images.wire import copy_of
from ovr.plan import make_plan

NOBODY = 65534


@contextmanager
def as_nobody():
    """The kernel decides by the effective user; root could read everything."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_to_all(one):
    for path in (one, *one.parents):
        if path.stat().st_uid == os.geteuid() and str(path).startswith("/tmp/"):
            path.chmod(0o755)
    for file in one.iterdir():
        file.chmod(0o644)
    return one


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", ["inventory.img", "pages-1.img", "mm-*.img", "."])
def test_no_permission(open_to_all, name, capsys):
    [path] = {*open_to_all.glob(name)} if name != "." else {open_to_all}
    path.chmod(0o700)
    assert cli.main(["plan", "-D", str(open_to_all)]) == 0  # all modules are loaded then
    with as_nobody(), pytest.raises(ImagesForbidden, match="Permission denied") as caught:
        make_plan(ImageSet.open(open_to_all))
    assert (caught.value.exit_code, "as root" in caught.value.hint) == (2, True)
    with as_nobody():
        assert cli.main(["plan", "-D", str(open_to_all)]) == 2
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.EIO, "disk"), (errno.ESTALE, "mount it again"), (errno.EMFILE, "limit")],
)
@pytest.mark.parametrize("call", ["open", "pread"])
def test_what_fails_below(one, monkeypatch, number, cure, call):
    usual = getattr(os, call)

    def failing(*words, **more):
        if call == "pread" or str(words[0]).endswith(".img"):
            raise OSError(number, os.strerror(number))
        return usual(*words, **more)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(ImagesUnreachable) as caught:
        make_plan(ImageSet.open(one))
    assert caught.value.exit_code == 3
    assert cure in caught.value.hint


def test_a_plan_reads_pages_too(one, monkeypatch):
    """A byte at each end: it is not found out when the guest has built the tree."""
    usual = os.pread
    pages = (one / "pages-1.img").stat()

    def failing(fd, size, offset):
        if os.fstat(fd).st_ino == pages.st_ino and offset > 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return usual(fd, size, offset)

    with ImageSet.open(one) as images:
        make_plan(images)
        monkeypatch.setattr(os, "pread", failing)
        with pytest.raises(ImagesUnreachable, match=r"pages-1\.img"):
            make_plan(images)


def test_one_that_is_gone_is_damage(one):
    with ImageSet.open(one) as images:
        (one / "pages-1.img").unlink()
        with pytest.raises(ImagesDamaged, match=r"pages-1\.img: cannot be read: No such file"):
            make_plan(images)


def test_a_pre_dump_is_called_so(one):
    with ImageSet.open(one) as images:
        inventory = copy_of(images.inventory)
    inventory.img_version = 0
    data = image_bytes("inventory.img", [encode(inventory)])
    (one / "inventory.img").write_bytes(data)
    with pytest.raises(ImagesUnsupported, match="of a pre-dump") as caught:
        ImageSet.open(one)
    assert "parent" in caught.value.hint
