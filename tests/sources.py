"""Sources to copy from."""

import os

_FILE = os.memfd_create("ovr-test-source")
_BASE = 17  # images within an archive do not begin with a page either


def as_file(data: bytes) -> tuple[int, int, int]:
    """Return descriptor, base and size of a file with `data`, until this is called again."""
    os.ftruncate(_FILE, 0)
    os.pwrite(_FILE, data, _BASE)
    return _FILE, _BASE, len(data)
