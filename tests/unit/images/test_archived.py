"""Archives that build on a pre-checkpoint, as podman makes them, and as an enemy would."""

import io
import json
import tarfile

import pytest

from ovr.checkpoint import Archive, PodmanCheckpoint, open_checkpoint
from ovr.checkpoint.tar import read_members
from ovr.errors import ImagesDamaged, ImagesUnsupported, OvrError, UsageError
from ovr.guest.protocol import HOOK_HELD
from ovr.images import ImageSet
from ovr.images.source import Sources
from ovr.plan import NO_POOL, build_inside, make_plan
from tests.unit.images.tars import END, head, long_name, pax, record
from tests.unit.images.test_archive import CONFIG, EXTRAS, members, pack
from tests.unit.images.test_tar import LINK, PATH, Bytes

LINKS = (("checkpoint/parent", "../pre-checkpoint"),)
BESIDE = {name: data for name, data in EXTRAS.items() if "/" not in name}


def images(directory, prefix):
    return {f"{prefix}/{path.name}": path.read_bytes() for path in directory.glob("*.img")}


@pytest.fixture
def before(dumps):
    return BESIDE | images((dumps / "parent" / "parent").resolve(), "pre-checkpoint")


@pytest.fixture
def after(dumps):
    return EXTRAS | images(dumps / "parent", "checkpoint")


@pytest.fixture
def both(before, after):
    return before | after


@pytest.fixture
def archives(tmp_path, before, after):
    """As podman makes them: in two archives, the pre-checkpoint is in the other one."""
    return pack(tmp_path / "web.tar", after, links=LINKS), pack(tmp_path / "before.tar", before)


def content(images):
    """All memory of an image set, by address, wherever it is read from."""
    found = {}
    with Sources() as sources:
        for memory in images.memories:
            for entry in memory.entries:
                source = sources.of(memory, int(entry["level"]))
                start, size = int(entry["offset"]), int(entry["size"])
                found[memory.name, int(entry["gva"])] = bytes(source.pages[start : start + size])
    return found


def test_memory_is_that_of_the_chain(archives, dumps):
    with Archive.open(*archives) as archive, ImageSet.open(dumps / "parent") as plain:
        levels = {int(n) for memory in plain.memories for n in memory.entries["level"]}
        assert levels == {0, 1}
        assert content(archive.images) == content(plain)
        assert make_plan(archive.images).bytes_outside == make_plan(plain).bytes_outside > 0


def test_all_in_one_archive(tmp_path, before, both, dumps):
    path = pack(tmp_path / "web.tar", both, links=LINKS)
    with Archive.open(path) as archive, ImageSet.open(dumps / "parent") as plain:
        assert content(archive.images) == content(plain)
    with pytest.raises(UsageError, match="does not build on ") as caught:
        Archive.open(path, pack(tmp_path / "before.tar", before))
    assert caught.value.hint == "leave out --import-previous"


@pytest.mark.parametrize("at_once", [False, True])
def test_what_the_guest_gets_builds_on_nothing(tmp_path, archives, after, both, at_once):
    path, previous = archives
    more = {"pre-checkpointed": b"another's"}
    if at_once:
        path, previous = pack(tmp_path / "x.tar", both | more, links=LINKS), None
    else:
        pack(path, after | more, links=LINKS)
    with PodmanCheckpoint.open(path, previous=previous) as checkpoint:
        plan = make_plan(checkpoint.images)
        (chunks,) = checkpoint.files(build_inside(plan, NO_POOL).images).values()
        made = members(b"".join(chunks))
        root = checkpoint.images.tasks[0].pid
    assert f"checkpoint/{HOOK_HELD}pagemap-{root}.img" in made
    assert made.keys() >= {*EXTRAS, *more}
    assert not [name for name in made if name == "checkpoint/parent" or "pre-checkpoint/" in name]


def test_a_runtime_gets_whole_images(archives):
    path, previous = archives
    with open_checkpoint(
        archive=path, previous=previous, runtime="runc", bundle="/srv/web", name="web"
    ) as checkpoint:
        files = checkpoint.files(build_inside(make_plan(checkpoint.images), NO_POOL).images)
        assert "parent" not in files
        assert any(name.startswith(f"{HOOK_HELD}pagemap-") for name in files)


def refused(kind: type[OvrError], words: str, *paths) -> str:
    with pytest.raises(kind, match=words) as caught:
        Archive.open(*paths)
    assert caught.value.hint
    return caught.value.hint


def test_the_pre_checkpoint_is_missing(archives, before, after, tmp_path):
    path, previous = archives
    hint = refused(UsageError, "builds on pre-checkpoint, which is not in it", path)
    assert "--import-previous" in hint
    assert "--pre-checkpoint --export" in hint
    empty = pack(tmp_path / "empty.tar", BESIDE)
    refused(ImagesUnsupported, r"empty\.tar: does not contain pre-checkpoint", path, empty)
    refused(ImagesUnsupported, r"web\.tar: does not contain pre-checkpoint", path, path)
    whole = pack(tmp_path / "whole.tar", after)
    refused(UsageError, "does not build on", whole, previous)
    hint = refused(
        ImagesUnsupported, "a pre-checkpoint, after which the container ran on", previous
    )
    assert "--import-previous" in hint


def test_a_pre_checkpoint_of_something_else(archives, before, tmp_path):
    path, _ = archives
    other = json.dumps(CONFIG | {"id": "cd" * 32}).encode()
    wrong = pack(tmp_path / "other.tar", before | {"config.dump": other})
    refused(
        UsageError, r"other\.tar: of container cdcdcdcdcdcd, but .*web\.tar is of abab", path, wrong
    )
    image = pack(tmp_path / "image.tar", {"manifest.json": b"{}"})
    refused(ImagesUnsupported, r"image\.tar: no pre-checkpoint of podman", path, image)


def test_pages_that_the_pre_checkpoint_has_not(archives, before, tmp_path):
    path, _ = archives
    few = {name: data for name, data in before.items() if "pagemap-" not in name}
    with (
        Archive.open(path, pack(tmp_path / "few.tar", few)) as archive,
        pytest.raises(ImagesDamaged, match="should be in the parent images"),
    ):
        _ = archive.images.tasks


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        ("/etc", ImagesUnsupported, "leads to '/etc', out of the archive"),
        ("../../pre-checkpoint", ImagesUnsupported, "out of the archive"),
        ("../pre-checkpoint/../../x", ImagesUnsupported, "out of the archive"),
        ("..", ImagesUnsupported, "out of the archive"),
        ("", ImagesUnsupported, "out of the archive"),
        (".", ImagesUnsupported, "more than 128 levels, or a cycle"),
        ("../checkpoint", ImagesUnsupported, "more than 128 levels, or a cycle"),
        ("../pre-checkpoint2", UsageError, "builds on pre-checkpoint2, which is not in it"),
        ("inventory.img", UsageError, "builds on checkpoint/inventory.img, which is not in it"),
    ],
)
def test_links_of_an_enemy(tmp_path, both, target, kind, words):
    refused(kind, words, pack(tmp_path / "x.tar", both, links=[("checkpoint/parent", target)]))


def test_a_circle_of_two(tmp_path, both):
    links = [*LINKS, ("pre-checkpoint/parent", "../checkpoint")]
    path = pack(tmp_path / "x.tar", both, links=links)
    refused(ImagesUnsupported, "or a cycle", path)


def test_the_other_archive_cannot_lead_back(archives, before, tmp_path):
    """The parent of a pre-checkpoint is looked up in its own archive only."""
    path, _ = archives
    links = [("pre-checkpoint/parent", "../checkpoint")]
    refused(
        UsageError, "builds on checkpoint, which is not in it",
        path, pack(tmp_path / "x.tar", before, links=links),
    )  # fmt: skip


def test_a_parent_that_is_no_link(tmp_path, both):
    path = pack(tmp_path / "x.tar", both | {"checkpoint/parent": b"../pre-checkpoint"})
    refused(ImagesDamaged, "checkpoint/parent is not a symbolic link", path)


def test_link_targets_in_extension_headers():
    for name, data in {
        "short": head("short", kind=tarfile.SYMTYPE),
        "gnu": long_name("t" * 150, LINK) + head("gnu", kind=tarfile.SYMTYPE),
        "pax": pax(record("linkpath", "ü" * 90)) + head("pax", kind=tarfile.SYMTYPE),
    }.items():
        member = read_members(Bytes(data + END), PATH)[name]
        assert member.is_symlink
        assert member.link == {"short": "", "gnu": "t" * 150, "pax": "ü" * 90}[name]
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        info = tarfile.TarInfo("a")
        info.type, info.linkname = tarfile.SYMTYPE, "../b"
        tar.addfile(info)
    assert read_members(Bytes(made.getvalue()), PATH)["a"].link == "../b"


def test_previous_without_an_archive(tmp_path):
    with pytest.raises(UsageError, match="--import-previous needs --archive"):
        open_checkpoint(tmp_path, previous=tmp_path)
