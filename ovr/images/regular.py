"""Describe regular files that tasks had open or mapped at the dump."""

import stat

from ovr.images.imageset import ImageSet
from ovr.images.objects import FileEntry

__all__ = ["regular_file"]


def regular_file(images: ImageSet, path: str) -> str:
    """Describe a file at the time of the dump; empty if the images do not mention it.

    Args:
        images: the image set.
        path: as the tasks see it, with or without its first slash.

    Raises:
        ImagesDamaged: ``files.img`` cannot be read.
    """
    name = b"/" + path.lstrip("/").encode(errors="surrogateescape")
    for entry in images.entries("files.img", FileEntry):
        if entry.HasField("reg") and b"/" + entry.reg.name.lstrip(b"/") == name:
            file = entry.reg
            facts = [f"{file.size} bytes"] if file.HasField("size") else []
            facts += [f"mode {stat.S_IMODE(file.mode):#o}"] if file.HasField("mode") else []
            facts += ["a build id"] if len(file.build_id) else []
            return f"at the dump it had {', '.join(facts)}" if facts else ""
    return ""
