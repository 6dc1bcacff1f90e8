"""Tars of an enemy: every one ends in an error that names the first cause, at once."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from ovr.checkpoint import Archive
from ovr.checkpoint.tar import Member, padded, read_members
from ovr.errors import ImagesDamaged, ImagesUnsupported
from tests.unit.images.tars import (
    CONFIG,
    END,
    base256,
    container,
    head,
    long_name,
    member,
    pax,
    record,
    sealed,
)

PATH = Path("x.tar")
LINK, SPARSE = tarfile.GNUTYPE_LONGLINK, tarfile.GNUTYPE_SPARSE
GLOBAL = tarfile.XGLTYPE


class Bytes:
    """A tar in memory."""

    def __init__(self, data: bytes) -> None:
        self._stream, self._left = io.BytesIO(data), len(data)

    def read(self, size: int) -> bytes:
        return self._stream.read(size)

    def skip(self, size: int) -> int:
        at = self._stream.tell()
        self._stream.seek(at + size)
        return min(size, self._left - at)


def read(data: bytes) -> dict[str, Member]:
    return read_members(Bytes(data), PATH)


HOSTILE = {
    "extension headers in a row": (
        pax(record("comment", "x")) * 800, "two pax headers for one member at byte 0"
    ),
    "long names in a row": (long_name("a") * 800, "two long name headers"),
    "long links in a row": (long_name("a", LINK) * 800, "two long link headers"),
    "global headers in a row": (pax(kind=GLOBAL) * 800, "two global pax headers"),
    "a long name and a pax name": (long_name("a") + pax(record("path", "b")), "two long names"),
    "a long link and a pax link": (
        long_name("a", LINK) + pax(record("linkpath", "b")), "two link targets"
    ),
    "two pax links": (pax(record("linkpath", "a"), record("linkpath", "b")), "values of linkpath"),
    "a global link": (pax(record("linkpath", "x"), kind=GLOBAL), "gives all members one"),
    "a negative pax size": (pax(record("size", "-5")), "a size of -5 bytes"),
    "a negative pax size of whole blocks": (pax(record("size", "-512")), "a size of -512 bytes"),
    "a huge pax size": (pax(record("size", str(1 << 70))), "a size of 11805"),
    "a large pax size": (pax(record("size", str(10**17))), "cut off in checkpoint/inventory.img"),
    "a pax size that is none": (pax(record("size", "0x10")), "a size of 0x10 bytes"),
    "two pax sizes": (pax(record("size", "1"), record("size", "2")), "two values of size"),
    "a global size": (pax(record("size", "1"), kind=GLOBAL), "gives all members one"),
    "a global name": (pax(record("path", "x"), kind=GLOBAL), "gives all members one"),
    "a negative size": (head("a", field=base256(-1024)), "a size of -1024 bytes at byte 0"),
    "a negative size of an extension header": (
        head("a", kind=tarfile.XHDTYPE, field=base256(-1024)), "a size of -1024 bytes at byte 0"
    ),
    "a negative size of a directory": (
        head("a", kind=tarfile.DIRTYPE, field=base256(-1)), "a size of -1 bytes at byte 0"
    ),
    "a huge size": (head("a", field=base256(1 << 80)), "cut off in a"),
    "a huge extension header": (
        head("a", kind=tarfile.XHDTYPE, field=base256(1 << 40)), "extension header of 10995"
    ),
    "an extension header longer than any": (
        member("a", bytes(2 << 20), tarfile.XHDTYPE), "extension header of 2097152 bytes"
    ),
    "records that are none": (member("a", b"9 nothing", tarfile.XHDTYPE), "damaged pax header"),
    "a record beyond its header": (
        member("a", b"99 path=b\n", tarfile.XHDTYPE), "damaged pax header"
    ),
    "a record of no length": (member("a", b"0 path=b\n", tarfile.XHDTYPE), "damaged pax header"),
    "a name without end": (pax(record("path", "n" * 9999)), "a name of 9999 characters"),
    "a name that leads up": (pax(record("path", "checkpoint/../../a")), "not a name below"),
    "a name from the root": (member("/etc/passwd"), "not a name below"),
    "a name in two ways": (member("checkpoint//core-1.img"), "not a name below"),
    "the same name twice": (member("a") + member("./a"), "a occurs twice"),
    "a damaged header": (b"\1" + member("a")[1:], "no header at byte 0: bad checksum"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile(tmp_path, what):
    data, words = HOSTILE[what]
    (tmp_path / "x.tar").write_bytes(container(data) + END)
    with pytest.raises(ImagesDamaged, match=words) as caught:
        Archive.open(tmp_path / "x.tar")
    assert caught.value.hint
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "data",
    [
        head("a", kind=SPARSE),
        pax(record("GNU.sparse.major", "1"), record("GNU.sparse.name", "a")) + member("b"),
    ],
)
def test_sparse_files(data):
    with pytest.raises(ImagesUnsupported, match="sparse file"):
        read(data + END)


def test_what_is_cut_off():
    whole = container(pax(record("path", "a" * 200)), member("b", b"x" * 600))
    names = list(read(whole + END))
    assert names[0] == "a" * 200
    for size in range(0, len(whole), 100):
        with pytest.raises(ImagesDamaged, match="cut off"):
            read(whole[:size])
    with pytest.raises(ImagesDamaged, match=f"cut off at byte {len(whole)}"):
        read(whole)  # between two members, without an end
    with pytest.raises(ImagesDamaged, match="without a member"):
        read(pax(record("path", "a")) + END)


def test_what_is_sound():
    """Numbers in base 256, overridden sizes, long names of both kinds, links with a size."""
    data = b"".join(
        [
            pax(record("comment", "x"), kind=GLOBAL),
            member("./"),
            head("a", field=base256(5)) + b"12345".ljust(512, b"\0"),
            pax(record("size", "3"), record("mtime", "1.5")) + head("b") + b"abc".ljust(512, b"\0"),
            long_name("n" * 150) + long_name("l" * 150, LINK) + head("short", 7, tarfile.SYMTYPE),
            member("d/", kind=tarfile.DIRTYPE),
        ]
    )
    found = read(data + END + b"what follows does not matter")
    assert {name: one.size for name, one in found.items()} == {
        ".": 0, "a": 5, "b": 3, "n" * 150: 0, "d": 0,
    }  # fmt: skip
    for name, content in (("a", b"12345"), ("b", b"abc")):
        one = found[name]
        assert data[one.offset_data : one.offset_data + one.size] == content
    assert [one.end for one in found.values()][-1] == len(data)
    assert found["d"].is_directory
    ends = [0, *(one.end for one in found.values())]
    assert [one.offset for one in found.values()] == ends[:-1]


def test_as_tarfile_has_it():
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w", format=form) as tar:
            for number in range(40):
                info = tarfile.TarInfo(f"checkpoint/ü{'ü' * number}/{number}")
                info.size = number * 100
                info.pax_headers = {"SCHILY.xattr.user.x": "y" * number}
                tar.addfile(info, io.BytesIO(bytes(info.size)))
            tar.addfile(tarfile.TarInfo("last"))
        found = read(made.getvalue())
        with tarfile.open(fileobj=io.BytesIO(made.getvalue())) as tar:
            theirs = {one.name: (one.size, one.offset, one.offset_data) for one in tar}
        assert {n: (one.size, one.offset, one.offset_data) for n, one in found.items()} == theirs


def test_as_many_as_there_can_be():
    form = head("00000")
    names = (b"%05x" % number for number in range((1 << 16) + 1))
    data = b"".join(sealed(name + form[5:]) for name in names)
    assert len(read(data[:-512] + END)) == 1 << 16
    with pytest.raises(ImagesDamaged, match="more than 65536 members"):
        read(data + END)


def test_extension_headers_of_much_in_all():
    filler = record("comment", "x" * ((1 << 20) - 100))
    data = b"".join(pax(filler) + head(str(number)) for number in range(80))
    with pytest.raises(ImagesDamaged, match="an extension header of"):
        read(data + END)
    assert padded(1) == 512


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"id": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"namedVolumes": [' + b'{"volumeName": "a"},' * 2000 + b"{}]}", "2001 volumes"),
        (b'{"namedVolumes": [{"volumeName": "--all"}]}', "not a volume name"),
        (b'{"namedVolumes": [{"volumeName": "\\ud800"}]}', "not a volume name"),
        (b'{"namedVolumes": [{"volumeName": 5}]}', "not a volume name"),
    ],
)
def test_configuration_of_an_enemy(tmp_path, config, words):
    images = member("checkpoint/inventory.img", b"x" * 8)
    files = images + member("config.dump", config) + member("spec.dump", b"{}")
    (tmp_path / "x.tar").write_bytes(files + END)
    with pytest.raises(ImagesDamaged, match=words):
        Archive.open(tmp_path / "x.tar")


def test_configuration_that_is_too_long(tmp_path):
    config = json.dumps({**json.loads(CONFIG), "x": "y" * (5 << 20)}).encode()
    images = member("checkpoint/inventory.img", b"x" * 8)
    (tmp_path / "x.tar").write_bytes(
        images + member("config.dump", config) + member("spec.dump", b"{}") + END
    )
    with pytest.raises(ImagesUnsupported, match=r"config\.dump has"):
        Archive.open(tmp_path / "x.tar")
