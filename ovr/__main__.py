"""``python -m ovr``, and the command ``ovr``."""

from typing import NoReturn

from ovr.cli import main
from ovr.cli.process import leave

__all__ = ["run"]


def run() -> NoReturn:
    """Run one command, as a process."""
    leave(main())


if __name__ == "__main__":
    run()
