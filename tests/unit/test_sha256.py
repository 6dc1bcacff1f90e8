"""The agent's own HMAC-SHA256 against Python's."""

import ctypes
import hmac
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovr.guest import compiler
from ovr.guest.wire import header

GUEST = Path(compiler.__file__).parent

# RFC 4231, section 4: key, data, and what the HMAC begins with.
VECTORS = {
    "1": (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b"),
    "2": (b"Jefe", b"what do ya want for nothing?", "5bdcc146bf60754e6a042426089575c7"),
    "3": (b"\xaa" * 20, b"\xdd" * 50, "773ea91e36800e46854db8ebd09181a7"),
    "6": (
        b"\xaa" * 131,
        b"Test Using Larger Than Block-Size Key - Hash Key First",
        "60e431591ee0b67f0d8a26aacbf5b77f",
    ),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    where = tmp_path_factory.mktemp("sha256")
    (where / "protocol.h").write_text(header())
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command = ["gcc", *flags, f"-I{where}", GUEST / "sha256.c", "-o", where / "sha256.so"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(where / "sha256.so"))


def digest(library: ctypes.CDLL, key: bytes, data: bytes) -> bytes:
    mac = ctypes.create_string_buffer(32)
    size = ctypes.c_size_t
    library.hmac_sha256(key, size(len(key)), data, size(len(data)), mac)
    return mac.raw


@pytest.mark.parametrize(("key", "data", "start"), VECTORS.values(), ids=VECTORS)
def test_vectors(library: ctypes.CDLL, key: bytes, data: bytes, start: str) -> None:
    assert digest(library, key, data).hex().startswith(start)
    assert digest(library, key, data) == hmac.digest(key, data, "sha256")


def test_every_length_around_a_block(library: ctypes.CDLL) -> None:
    for size in range(200):
        for key, data in ((b"k" * size, b"data"), (b"key", bytes(range(size)))):
            assert digest(library, key, data) == hmac.digest(key, data, "sha256"), size


@given(st.binary(max_size=300), st.binary(max_size=1000))
def test_any_bytes(library: ctypes.CDLL, key: bytes, data: bytes) -> None:
    assert digest(library, key, data) == hmac.digest(key, data, "sha256")
