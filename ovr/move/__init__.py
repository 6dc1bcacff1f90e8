"""The move of a tree between VMs: `story` has its steps in order, `report` its result."""

from ovr.move.container import to_move
from ovr.move.report import MoveReport
from ovr.move.story import DOWNTIME, move

__all__ = ["DOWNTIME", "MoveReport", "move", "to_move"]
