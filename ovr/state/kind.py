"""What a kind of state is: the interface that every module in `kinds` implements.

A kind says what; where is the scope's business, and when is `settings`': the VM is held during each
write, and every thread of the tree is stopped by CRIU in a ptrace stop.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from ovr.state.scope import Scope

__all__ = ["Kind"]


class Kind(ABC):
    """A kind of state that is written from outside.

    Attributes:
        name: what ``--outside`` calls it.
        groups: what it is called together with others.
        summary: what it is, in one line, with the kernel's name for it.
        source: where CRIU and the kernel do the same.
        scope: what it belongs to.
    """

    name: ClassVar[str]
    groups: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    source: ClassVar[str]
    scope: ClassVar[Scope]

    @abstractmethod
    def take(self, image: Any) -> Any:
        """Return the value, of plain Python types; None if the message carries none.

        Raises:
            ImagesDamaged: the kernel never has such a value.
        """

    @abstractmethod
    def neutralise(self, image: Any) -> None:
        """Leave the neutral value in a copy of the message."""

    @abstractmethod
    def write(self, target: Any, value: Any) -> None:
        """Write the value into the kernel object."""

    @abstractmethod
    def read(self, target: Any) -> Any:
        """Return what `write` wrote, as the guest has it now."""
