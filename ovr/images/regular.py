"""Regular files that the tasks had open or mapped, as they were at the dump."""

import stat

from ovr.images.imageset import ImageSet
from ovr.images.objects import FileEntry

__all__ = ["regular_file"]


def regular_file(images: ImageSet, path: str) -> str:
    """Describe a file as the dump saw it; the empty string if the images do not have it.

    Args:
        images: the image set.
        path: in the file systems of the tasks, with or without its first slash.

    Raises:
        ImagesDamaged: ``files.img`` cannot be read.
    """
    name = b"/" + path.lstrip("/").encode(errors="surrogateescape")
    for entry in images.entries("files.img", FileEntry):
        if entry.HasField("reg") and b"/" + entry.reg.name.lstrip(b"/") == name:
            file = entry.reg
            said = [f"{file.size} bytes"] if file.HasField("size") else []
            said += [f"mode {stat.S_IMODE(file.mode):#o}"] if file.HasField("mode") else []
            said += ["a build id"] if len(file.build_id) else []
            return f"at the dump it had {', '.join(said)}" if said else ""
    return ""
