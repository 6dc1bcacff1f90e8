"""Define the interface of a kind of state, implemented by the modules in `kinds`.

A kind converts and writes a value; its scope finds the objects. During each write the VM is held,
and CRIU has every thread of the tree in a ptrace stop.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from ovr.state.scope import Scope

__all__ = ["Kind"]


class Kind(ABC):
    """A kind of state that is written from outside.

    Attributes:
        name: its name in ``--outside``.
        groups: names of the groups it belongs to.
        summary: a description in one line, with the kernel's name.
        source: the code of CRIU and of the kernel that does the same.
        scope: the sort of kernel object that has it.
    """

    name: ClassVar[str]
    groups: ClassVar[tuple[str, ...]]
    summary: ClassVar[str]
    source: ClassVar[str]
    scope: ClassVar[Scope]

    @abstractmethod
    def take(self, image: Any) -> Any:
        """Return the value in plain Python types; None if the message has none.

        Raises:
            ImagesDamaged: the kernel cannot have such a value.
        """

    @abstractmethod
    def neutralise(self, image: Any) -> None:
        """Replace the value in a copy of the message by the neutral one."""

    @abstractmethod
    def write(self, target: Any, value: Any) -> None:
        """Write the value into the kernel object."""

    @abstractmethod
    def read(self, target: Any) -> Any:
        """Return the current value of the kernel object, in the form that `take` returns."""
