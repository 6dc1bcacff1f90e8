"""Define the kinds of state that are written from outside, except memory.

A kind of state is one class in `kinds`; `scope` finds its objects in the images and in the guest;
`settings` takes the values from the images and neutralises them; `refused` lists the kinds that
stay inside, and the reasons.
"""

from ovr.state.guest import GuestTree
from ovr.state.inside import INSIDE_KINDS, InsideKind
from ovr.state.kind import Kind
from ovr.state.kinds import KINDS
from ovr.state.settings import Setting

__all__ = ["INSIDE_KINDS", "KINDS", "GuestTree", "InsideKind", "Kind", "Setting"]
