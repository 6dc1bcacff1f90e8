"""The agent (C), its packaging and its protocol, and the host's client of it (`client`)."""

from ovr.guest.compiler import build

__all__ = ["build"]
