"""Write the window size of terminals."""

from typing import Any, Final

from ovr.errors import ImagesDamaged
from ovr.images.objects import TtyInfoEntry
from ovr.state.kind import Kind
from ovr.state.scope import TTY

__all__ = ["KINDS", "WindowSize"]

_FIELDS: Final = ("ws_row", "ws_col", "ws_xpixel", "ws_ypixel")


class WindowSize(Kind):
    """TIOCSWINSZ, for pseudo terminals with both ends in the tree."""

    name = "window_size"
    groups = ("files",)
    summary = "window size of the tree's own pseudo terminals (tty_struct.winsize)"
    source = "TIOCSWINSZ in criu/tty.c; pty_resize()"
    scope = TTY

    def take(self, image: TtyInfoEntry) -> tuple[int, ...] | None:
        """Return rows and columns, then width and height in pixels."""
        if not image.HasField("winsize"):
            return None
        size = tuple(getattr(image.winsize, name) for name in _FIELDS)
        if max(size) > 0xFFFF:
            raise ImagesDamaged(f"a terminal window of {size}", "dump again")
        return size

    def neutralise(self, image: TtyInfoEntry) -> None:
        """Set all fields to 0; CRIU requires the message."""
        for name in _FIELDS:
            setattr(image.winsize, name, 0)

    def write(self, target: Any, value: tuple[int, ...]) -> None:
        """Store as pty_resize() does, without SIGWINCH: the process already has this size."""
        # SAFETY: both ends of the terminal belong to tasks of the tree, all of them stopped, so
        # winsize_mutex is free. Nothing is derived from it. Undone by killing the tree.
        for name, number in zip(_FIELDS, value, strict=True):
            setattr(target.winsize, name, number)

    def read(self, target: Any) -> tuple[int, ...]:
        return tuple(getattr(target.winsize, name) for name in _FIELDS)


KINDS: Final = (WindowSize(),)
