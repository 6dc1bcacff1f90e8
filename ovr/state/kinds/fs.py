"""Write the file mode creation mask, which tasks share with CLONE_FS."""

from typing import Any, Final

from ovr.images import FsEntry
from ovr.state.kind import Kind
from ovr.state.scope import FS

__all__ = ["KINDS", "Umask"]


class Umask(Kind):
    """umask(2)."""

    name = "umask"
    groups = ("process",)
    summary = "file mode creation mask (fs_struct.umask)"
    source = "restore_fs() in criu/files.c; sys_umask()"
    scope = FS

    def take(self, image: FsEntry) -> int | None:
        """Return the mask."""
        return image.umask & 0o777 if image.HasField("umask") else None

    def neutralise(self, image: FsEntry) -> None:
        """Set 0, which no process has by accident."""
        image.umask = 0

    def write(self, target: Any, value: int) -> None:
        """Store as sys_umask() does."""
        # SAFETY: the fs_struct was made for this tree by fork or clone, so only tasks of the
        # tree share it, all of them stopped. The kernel changes umask by one plain store and
        # derives nothing from it. Undone by killing the tree.
        target.umask = value

    def read(self, target: Any) -> int:
        return int(target.umask)


KINDS: Final = (Umask(),)
