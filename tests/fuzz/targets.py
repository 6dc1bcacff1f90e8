"""All targets in Python, by name. Importing it imports the extension that is under test."""

from tests.fuzz import agent, dump, guest, images, kernel, memory, tars
from tests.fuzz.target import Target

__all__ = ["TARGETS"]

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (images, tars, kernel, guest, memory, agent, dump)
    for target in module.TARGETS
}
