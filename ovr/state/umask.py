"""The file mode creation mask: ``task->fs->umask``."""

from typing import Any

from ovr.images import Task
from ovr.state.kind import InsideTask

__all__ = ["Umask"]


class Umask:
    """umask(2); in CRIU ``fs_entry.umask``, restored by restore_fs() in criu/files.c."""

    name = "umask"
    summary = "file mode creation mask (task->fs->umask)"

    def take(self, task: Task) -> int | None:
        """Return the mask, or None for images that carry none."""
        return task.umask

    def neutralise(self, inside: InsideTask) -> None:
        """Zero: what a process never has by accident, so that a missing write shows."""
        assert inside.fs is not None
        inside.fs.umask = 0

    def write(self, task: Any, value: int) -> None:
        """Write ``fs_struct.umask``."""
        # SAFETY: the fs_struct belongs to the task, or to it and others of the restored tree
        # (CLONE_FS), all of them stopped under CRIU. The kernel changes umask by one plain store
        # (sys_umask) and derives nothing from it. Undone by killing the tree.
        task.fs.umask = value

    def read(self, task: Any) -> int:
        """Read ``fs_struct.umask``."""
        return int(task.fs.umask)
