"""The dump: `story` has its steps in order, `report` its result."""

from ovr.dump.report import DumpReport
from ovr.dump.story import dump

__all__ = ["DumpReport", "dump"]
