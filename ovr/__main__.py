"""``python -m ovr``, and the command ``ovr``."""

import os
import sys
from typing import NoReturn

from ovr.standby.client import restore_there

__all__ = ["run"]


def run() -> NoReturn:
    """Run one command, as a process; a restore in the process that stands by, if there is one."""
    if sys.argv[1:2] == ["restore"]:
        code = restore_there(sys.argv[1:])
        if code is not None:
            os._exit(code)
    from ovr.cli import main  # noqa: PLC0415 - what is done elsewhere need not be loaded here
    from ovr.cli.process import leave  # noqa: PLC0415 - the same

    leave(main())


if __name__ == "__main__":
    run()
