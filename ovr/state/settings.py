"""Take the values of all kinds of state from the images, and neutralise them in the inside set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ovr.images import Draft, ImageSet
from ovr.state.kind import Kind
from ovr.state.scope import Binding

__all__ = ["Setting", "neutralise", "take"]


@dataclass(frozen=True)
class Setting:
    """A value to be written from outside."""

    kind: Kind
    binding: Binding
    value: Any


def take(images: ImageSet, kinds: Iterable[Kind]) -> tuple[Setting, ...]:
    """Return the values of these kinds of state in the images, kind by kind.

    Raises:
        ImagesDamaged: an impossible value.
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
    """Replace the values in the inside image set by neutral ones."""
    for setting in settings:
        binding = setting.binding
        setting.kind.neutralise(draft.message(binding.image, binding.index, type(binding.message)))
