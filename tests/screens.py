"""Screens of commands run in tmux, kept as golden files.

``OVR_GOLDEN=1`` writes the files anew; look at them (``cat`` shows the colours) before you commit.
"""

import difflib
import os
import re
import shlex
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["assert_golden", "screen"]

KEPT = ("PATH", "HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME")
GOLDEN = Path(__file__).parent / "golden"


def screen(
    command: Sequence[str | Path],
    *,
    width: int = 100,
    height: int = 60,
    env: Mapping[str, str] | None = None,
    until: str | None = None,
    timeout: float = 120.0,
) -> str:
    """Run a command in a terminal and return what is on the screen when it has ended.

    Args:
        command: what to run.
        width: of the terminal, in characters.
        height: in lines; what scrolls off is lost.
        env: beside `KEPT` and a UTF-8 locale.
        until: take the picture when this text has appeared, and end the command.
        timeout: seconds to wait at most.

    Returns:
        The lines, with colours as escape sequences, without blanks at their ends.
    """
    tmux = ("tmux", "-u", "-L", f"ovr-{uuid.uuid4().hex}", "-f", "/dev/null")
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    words = " ".join(f"{k}={shlex.quote(v)}" for k, v in (env or {}).items())
    typed = f"env {words} {shlex.join(map(str, command))}"
    # A command after it keeps the screen.
    ended = f"{shlex.join((*tmux, 'wait-for', '-S', 'ended'))}; sleep 1000"
    # tmux's server is what the command inherits its environment from.
    session = subprocess.run(
        [*tmux, "new-session", "-d", "-x", str(width), "-y", str(height), f"{typed}; {ended}"],
        env={**kept, "LANG": "C.UTF-8", "TERM": "xterm-256color"},
        check=True,
    )
    assert session.returncode == 0
    try:
        if until is None:
            subprocess.run([*tmux, "wait-for", "ended"], check=True, timeout=timeout)
            return _capture(tmux)
        subprocess.run(
            ["sh", "-c", f"until {shlex.join((*tmux, 'capture-pane', '-p'))} | grep -qF -- "
             f"{shlex.quote(until)}; do sleep 0.1; done"],
            check=True, timeout=timeout,
        )  # fmt: skip
        return _capture(tmux)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def _capture(tmux: Sequence[str]) -> str:
    done = subprocess.run(
        [*tmux, "capture-pane", "-p", "-e"], check=True, capture_output=True, text=True
    )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines) + "\n"


def assert_golden(name: str, shown: str, masks: Mapping[str, str] | None = None) -> None:
    """Compare a screen with the golden file of that name.

    Args:
        name: of the file, without ``.txt``.
        shown: what `screen` gave.
        masks: what differs from run to run: regular expressions, and what stands for them.

    Raises:
        AssertionError: they differ; the message has the difference.
    """
    for pattern, word in (masks or {}).items():
        shown = re.sub(pattern, word, shown)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("OVR_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(shown)
    wanted = path.read_text()
    if shown != wanted:
        lines = difflib.unified_diff(
            wanted.splitlines(), shown.splitlines(), f"golden/{name}.txt", "shown", lineterm=""
        )
        raise AssertionError("the screen is not as it was:\n" + "\n".join(lines))
