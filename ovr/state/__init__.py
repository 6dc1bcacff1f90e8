"""The state that is written from outside: memory in pages, everything else in values.

A kind of state is one class in `kinds`; `scope` finds what it belongs to, in the images and in the
guest; `settings` takes, neutralises, writes and verifies all of them; `refused` says which kinds
are not there and why.
"""

from ovr.state.guest import GuestTree
from ovr.state.kind import Kind
from ovr.state.kinds import KINDS
from ovr.state.refused import INSIDE_KINDS, InsideKind
from ovr.state.settings import Setting

__all__ = ["INSIDE_KINDS", "KINDS", "GuestTree", "InsideKind", "Kind", "Setting"]
