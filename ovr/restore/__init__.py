"""The restore: `story` has its steps in order, `report` its result."""

from ovr.restore.report import Report
from ovr.restore.story import VERIFY_MODES, restore

__all__ = ["VERIFY_MODES", "Report", "restore"]
