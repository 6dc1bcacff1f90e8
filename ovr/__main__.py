"""``python -m ovr``."""

import sys

from ovr.cli import main

if __name__ == "__main__":
    sys.exit(main())
