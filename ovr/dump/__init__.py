"""The dump: `story` has its steps in order, `report` its result."""

from ovr.attempt.copier import VERIFY_MODES
from ovr.dump.precopy import AS_MANY_AS_HELP
from ovr.dump.report import DumpReport
from ovr.dump.story import dump

__all__ = ["AS_MANY_AS_HELP", "VERIFY_MODES", "DumpReport", "dump"]
