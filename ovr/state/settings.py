"""Values of all kinds of state: read from the images, and left out of the inside image set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ovr.images import Draft, ImageSet
from ovr.state.kind import Kind
from ovr.state.scope import Binding

__all__ = ["Setting", "neutralise", "take"]


@dataclass(frozen=True)
class Setting:
    """A value, its kind and the binding that it belongs to."""

    kind: Kind
    binding: Binding
    value: Any


def take(images: ImageSet, kinds: Iterable[Kind]) -> tuple[Setting, ...]:
    """Return what the images say of these kinds of state, kind by kind.

    Raises:
        ImagesDamaged: they say what cannot be.
    """
    bindings: dict[str, tuple[Binding, ...]] = {}
    found = []
    for kind in kinds:
        scope = kind.scope
        if scope.name not in bindings:
            bindings[scope.name] = tuple(scope.bindings(images))
        for binding in bindings[scope.name]:
            value = kind.take(binding.message)
            if value is not None:
                found.append(Setting(kind, binding, value))
    return tuple(found)


def neutralise(settings: Iterable[Setting], draft: Draft) -> None:
    """Leave the neutral values in the inside images."""
    for setting in settings:
        binding = setting.binding
        setting.kind.neutralise(draft.message(binding.image, binding.index, type(binding.message)))
