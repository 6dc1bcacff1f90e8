"""What runs in the guest: the agent (C), its unit file, and the protocol both sides share."""

from ovr.guest.compiler import build

__all__ = ["build"]
