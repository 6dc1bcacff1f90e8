import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr.errors import ImagesDamaged, ImagesUnsupported
from ovr.images.framing import Frame, decode, encode, frames, header, image_bytes, write_image
from ovr.images.messages import CoreEntry, FsEntry, MmEntry, TaskTimersEntry, VmaEntry
from ovr.images.objects import PipeDataEntry
from ovr.images.wire import UINT32, Message, copy_of, entry, repeated, required

payloads = st.lists(st.binary(max_size=300), max_size=20)


@given(payloads)
def test_frames_round_trip(entries):
    data = image_bytes("core-1.img", map(Frame, entries))
    assert [frame.payload for frame in frames(data, "core-1.img")] == entries


@given(payloads, st.integers(1, 400))
def test_cut_anywhere_is_damaged_or_shorter(entries, cut):
    data = image_bytes("mm-7.img", map(Frame, entries))[:-cut]
    try:
        assert [f.payload for f in frames(data, "mm-7.img")] == entries[: _whole(data)]
    except ImagesDamaged as error:
        assert "mm-7.img" in str(error) and error.hint


def _whole(data):
    """How many entries a cut image still has, if it was cut between two of them."""
    position, count = 8, 0
    while position < len(data):
        position += 4 + struct.unpack_from("<I", data, position)[0]
        count += 1
    return count


def test_raw_bytes_after_entries():
    entries = [
        Frame(encode(PipeDataEntry(pipe_id=i, bytes=i * 3)).payload, b"abc" * i) for i in (0, 5)
    ]
    data = image_bytes("pipes-data.img", entries)

    def size(payload):
        return decode(PipeDataEntry, payload, "pipes-data.img").bytes

    assert list(frames(data, "pipes-data.img", size)) == entries
    with pytest.raises(ImagesDamaged, match=r"pipes-data.img: 15 bytes needed .* 14 present"):
        list(frames(data[:-1], "pipes-data.img", size))


@pytest.mark.parametrize(
    ("name", "head", "error", "text"),
    [
        ("core-1.img", header("mm-1.img"), ImagesDamaged, "core-1.img: holds a mm image"),
        ("core-1.img", b"\x19\x43\x56\x54\1\2\3\4", ImagesUnsupported, "image magic 0x04030201"),
        ("core-1.img", b"ELF\0ELF\0", ImagesUnsupported, "unknown image magic 0x00464c45"),
        ("core-1.img", header("core-1.img")[4:] * 2, ImagesUnsupported, "before 2.0"),
        ("core-1.img", b"\x19\x43", ImagesDamaged, "cut off inside its header"),
        ("core-1.img", b"", ImagesDamaged, "cut off inside its header"),
        ("inventory.img", header("core-1.img"), ImagesDamaged, "holds a core image"),
        ("amdgpu-kfd-1.img", b"", ImagesUnsupported, "no image type of CRIU 3.17 to 4.2"),
    ],
)
def test_wrong_headers(name, head, error, text):
    with pytest.raises(error, match=text) as caught:
        list(frames(head, name))
    assert caught.value.hint and "\n" not in str(caught.value) + caught.value.hint


def test_names():
    assert (
        header("pages-1.img") == header("tmpfs-dev-5.tar.gz.img") == header("route6-9.img") == b""
    )
    assert header("ghost-file-1a.img")[4:] == struct.pack("<I", 0x52583605)
    assert header("pagemap-shmem-1026.img") == header("pagemap-5.img")
    assert header("pipes-data.img") != header("pipes.img")


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_damaged(payload):
    for kind in (CoreEntry, VmaEntry, FsEntry):
        try:
            decode(kind, payload, "x.img")
        except ImagesDamaged as error:
            assert "x.img" in str(error)


def test_missing_required_field_is_named():
    with pytest.raises(ImagesDamaged, match=r"fs-1.img: FsEntry without root_id"):
        decode(FsEntry, b"\x08\x01", "fs-1.img")


@entry
class NewerFs(Message):
    """fs_entry as a future CRIU might have it."""

    cwd_id: int = required(1, UINT32)
    root_id: int = required(2, UINT32)
    umask: int = required(3, UINT32)
    shiny: int = required(77, UINT32)
    lists: list[int] = repeated(78, UINT32)


def test_unknown_fields_survive_a_rewrite():
    newer = NewerFs(cwd_id=1, root_id=2, umask=0o137, shiny=7, lists=[1, 2, 3])
    fs = copy_of(decode(FsEntry, newer.SerializeToString(), "fs-1.img"))
    fs.umask = 0
    again = NewerFs.FromString(encode(fs).payload)
    assert (again.umask, again.shiny, list(again.lists)) == (0, 7, [1, 2, 3])
    newer.umask = 0
    assert encode(fs).payload == newer.SerializeToString()


def test_write_image_leaves_nothing_behind_on_failure(tmp_path):
    def broken():
        yield b"half"
        raise ImagesDamaged("cut")

    with pytest.raises(ImagesDamaged):
        write_image(tmp_path, "fs-1.img", broken())
    assert not list(tmp_path.iterdir())
    write_image(tmp_path, "fs-1.img", [b"wh", b"ole"])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"fs-1.img": b"whole"}


def test_entries_of_many_empty_messages():
    """Two bytes of a file become a hundred in memory, and would be listed one by one."""
    for size in (1 << 12, 1 << 20, 4 << 20):
        with pytest.raises(ImagesDamaged, match=r"mm-1\.img: MmEntry without") as caught:
            decode(MmEntry, b"\x72\0" * (size // 2), "mm-1.img")
        assert len(str(caught.value)) < 1000
    for kind, name in ((MmEntry, "mm-1.img"), (TaskTimersEntry, "core-1.img")):
        with pytest.raises(ImagesDamaged, match="too much for a"):
            decode(kind, b"\x72\0" * (3 << 20), name)


@pytest.mark.parametrize("depth", [99, 101, 1 << 20])
def test_messages_that_are_nested_deeply(depth):
    with pytest.raises(ImagesDamaged, match="cannot be decoded"):
        decode(MmEntry, b"\xfb\x7f" * depth, "mm-1.img")
