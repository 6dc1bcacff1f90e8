"""Values of all kinds of state: read from the images, and left out of the inside image set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ovr.images import Draft, ImageSet
from ovr.state.kind import Kind
from ovr.state.scope import Place

__all__ = ["Setting", "neutralise", "take"]


@dataclass(frozen=True)
class Setting:
    """A value, its kind and the place that it belongs to."""

    kind: Kind
    place: Place
    value: Any


def take(images: ImageSet, kinds: Iterable[Kind]) -> tuple[Setting, ...]:
    """Return what the images say of these kinds of state, kind by kind.

    Raises:
        ImagesDamaged: they say what cannot be.
    """
    places: dict[str, tuple[Place, ...]] = {}
    found = []
    for kind in kinds:
        scope = kind.scope
        if scope.name not in places:
            places[scope.name] = tuple(scope.places(images))
        for place in places[scope.name]:
            value = kind.take(place.message)
            if value is not None:
                found.append(Setting(kind, place, value))
    return tuple(found)


def neutralise(settings: Iterable[Setting], draft: Draft) -> None:
    """Leave the neutral values in the inside images."""
    for setting in settings:
        place = setting.place
        setting.kind.neutralise(draft.message(place.image, place.index, type(place.message)))
