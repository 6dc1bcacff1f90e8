"""Collect the kinds of state that are written from outside from the modules of this package."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Final

from ovr.state.kind import Kind

__all__ = ["KINDS"]


def _discover() -> tuple[Kind, ...]:
    names = sorted(module.name for module in iter_modules(__path__))
    return tuple(
        kind for name in names for kind in import_module(f"{__name__}.{name}").KINDS
    )  # fmt: skip


KINDS: Final = _discover()
"""All kinds except memory, which is handled in pages (`ovr.plan.areas`), sorted by module."""
