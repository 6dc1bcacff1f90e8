"""Targets: CRIU images."""

import atexit
import io
import itertools
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from ovr.checkpoint import Archive
from ovr.errors import OvrError
from ovr.images import ImageSet, image_chunks
from ovr.images.directory import ImageDirectory
from ovr.images.packed import packing, refuse_packed
from ovr.images.pagemap import Pagemap, decode_pagemap, encode_pagemap
from ovr.plan import NO_POOL, build_inside, make_plan
from tests.fuzz.patches import patched, sample_patches
from tests.fuzz.target import Input, Target
from tests.fuzz.tars import resealed

__all__ = ["TARGETS"]

DATA = Path(__file__).parents[1] / "unit" / "images" / "data"
SUITES = ("bookworm", "trixie", "forky")
DUMPS = ("one", "tree", "parent", "uts")
PARENT_SIZE = 8 << 20
"""Damaged inputs may make much of little, but no more than this in all of the inside images."""


class Dump:
    """A real dump in a directory of this process's own, with images that can be damaged."""

    def __init__(self, suite: str, name: str) -> None:
        home = Path(tempfile.mkdtemp(prefix="ovr-fuzz-"))
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        with tarfile.open(DATA / f"{suite}.tar.xz") as archive:
            archive.extractall(home, filter="data")
        self.path = home / name
        files = sorted(self.path.rglob("*.img"), key=lambda file: ("pages-" in file.name, file))
        self.names = [str(file.relative_to(self.path)) for file in files]
        self.contents = [file.read_bytes() for file in files]

    def try_with(self, contents: list[bytes]) -> None:
        """Plan a restore from the images with these contents; they are sound again after it."""
        changed = [n for n, content in enumerate(contents) if content is not self.contents[n]]
        try:
            for number in changed:
                (self.path / self.names[number]).write_bytes(contents[number])
            plan_all(self.path)
        finally:
            for number in changed:
                (self.path / self.names[number]).write_bytes(self.contents[number])


def plan_all(path: Path) -> None:
    with ImageSet.open(path) as images:
        plan = make_plan(images)
        assert plan.bytes_outside <= plan.bytes_total
        size = 0
        for content in build_inside(plan, NO_POOL).images.values():
            for chunk in image_chunks(content):
                size += len(chunk)
                if size > PARENT_SIZE:
                    raise AssertionError("inside images larger than all that was given")


@cache
def dump(number: int) -> Dump:
    all_of_them = list(itertools.product(SUITES, DUMPS))
    return Dump(*all_of_them[number % len(all_of_them)])


def several(data: bytes) -> None:
    """Damage to any of the images of a dump."""
    source = Input(data)
    chosen = dump(source.number())
    chosen.try_with(patched(chosen.contents, source))


def several_seeds() -> Iterator[bytes]:
    for number in range(len(SUITES) * len(DUMPS)):
        # pages images come last: their content does not matter, only their size
        parts = [content for content in dump(number).contents if len(content) < 1 << 12]
        for sample in itertools.islice(sample_patches(parts), 0, None, 5):
            yield bytes([number]) + sample


def whole(data: bytes) -> None:
    """One image of a dump replaced by the input."""
    source = Input(data)
    chosen = dump(source.number())
    which = source.number() % len(chosen.names)
    contents = list(chosen.contents)
    contents[which] = source.rest()
    chosen.try_with(contents)


def whole_seeds() -> Iterator[bytes]:
    for number in range(len(SUITES) * len(DUMPS)):
        for which, content in enumerate(dump(number).contents):
            if len(content) < 1 << 12:
                yield bytes([number, which]) + content


def pagemap(data: bytes) -> None:
    """The decoder of pagemaps alone: what it accepts it writes and reads again as the same."""
    found = decode_pagemap(data, "pagemap-1.img")
    again = encode_pagemap(Pagemap(found.pages_id, found.entries, found.compat), "pagemap-1.img")
    twice = decode_pagemap(again, "pagemap-1.img")
    assert twice.pages_id == found.pages_id
    assert np.array_equal(twice.entries, found.entries)
    ends = found.entries["gva"] + found.entries["size"]
    assert (found.entries["gva"][1:] >= ends[:-1]).all()


def pagemap_seeds() -> Iterator[bytes]:
    for number in range(len(SUITES) * len(DUMPS)):
        chosen = dump(number)
        for name, content in zip(chosen.names, chosen.contents, strict=True):
            if "pagemap-" in name:
                yield content


@cache
def tar_of(number: int) -> bytes:
    """A container's archive of a dump; what damage can reach comes first."""
    config = b'{"id": "1", "name": "n", "spec": {}, "namedVolumes": [{"volumeName": "v"}]}'
    chosen = dump(number % len(SUITES) * len(DUMPS))  # the small ones: `images` has all
    images = zip(chosen.names, chosen.contents, strict=True)
    parts = [("config.dump", config), ("spec.dump", b"{}"), ("rootfs-diff.tar", b"x" * 100)]
    parts += [(f"checkpoint/{name}", content) for name, content in images]
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, content in parts:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


@cache
def headers_of(data: bytes) -> list[int]:
    """Where the headers are in a tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [member.offset for member in tar]


def archive(data: bytes) -> None:
    """A damaged archive: what is made of it for the guest is an archive of the same container."""
    source = Input(data)
    whole_tar = tar_of(source.number())
    (damaged,) = patched([whole_tar], source)
    damaged = resealed(damaged, headers_of(whole_tar))
    with tempfile.NamedTemporaryFile(prefix="ovr-fuzz-") as file:
        file.write(damaged)
        file.flush()
        with Archive.open(Path(file.name)) as found:
            inside = build_inside(make_plan(found.images), NO_POOL).images
            container, size = found.container, 0
            with tempfile.NamedTemporaryFile(prefix="ovr-fuzz-") as made:
                for chunk in found.with_images(inside):
                    size += made.write(chunk)
                    if size > len(damaged) + PARENT_SIZE:
                        raise AssertionError("larger than all that was given")
                made.flush()
                with Archive.open(Path(made.name)) as again:
                    assert again.container == container
                    assert set(again.images.names) == set(inside)


def archive_seeds() -> Iterator[bytes]:
    for number in range(len(SUITES)):
        for sample in sample_patches([tar_of(number)[: 1 << 16]]):
            yield bytes([number]) + sample


def packed(data: bytes) -> None:
    """Packed files are told from images by their first bytes; a file is no directory."""
    refused = packing(data) is not None
    try:
        refuse_packed(data, "pages-1.img")
    except OvrError:
        assert refused
    else:
        assert not refused
    with tempfile.NamedTemporaryFile(prefix="ovr-fuzz-") as file:
        file.write(data)
        file.flush()
        ImageDirectory(Path(file.name))
        raise AssertionError("a file was opened as a directory")


def packed_seeds() -> Iterator[bytes]:
    yield b""
    yield b"ustar".rjust(262, b"\0")
    for magic in (b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"\x04\x22\x4d\x18", b"\xfd7zXZ\0", b"BZh"):
        yield magic + bytes(8)


TARGETS = (
    Target("images", several_seeds, several),
    Target("image", whole_seeds, whole),
    Target("pagemap", pagemap_seeds, pagemap),
    Target("archive", archive_seeds, archive),
    Target("packed", packed_seeds, packed, longest=600),
)
