"""One tree of errors; each class carries its exit code, each instance its cure.

::

    OvrError                     1
    ├── UsageError               2   invalid command line
    │   └── ImagesForbidden      2   no permission to read the images
    ├── Unreachable              3
    │   ├── ImagesUnreachable    3   the disk or file server that has the images fails
    │   ├── VmUnreachable        3   no such VM, no QMP
    │   └── AgentUnreachable     3   no agent in the guest, or the link broke
    │       └── AgentUntrusted   3   the peer is not the agent run by root of this guest
    ├── CheckFailed              4   this VM cannot be used, or a move not be made or decided so
    │   ├── RamNotShared         4
    │   └── KernelNotFound       4   no kernel, or one whose types do not fit
    ├── ImagesUnsupported        5   valid images with content we cannot restore
    ├── ImagesDamaged            6
    ├── VerifyMismatch           7
    ├── ArchiveFailed            8   a container has ended, its archive is incomplete
    ├── MoveInDoubt              9   a moved tree is frozen in its source, and may run elsewhere
    ├── GuestFault               1   invalid content of guest memory
    ├── AttemptFailed            1   a restore or dump was aborted, and undone
    │   ├── HoldBroken           1
    │   ├── PidTaken             1
    │   ├── TreeDamaged          1   a dumped tree may not run as before
    │   ├── TaskDied             1
    │   └── CriuFailed           1
    └── LabError                 1   the lab's own set-up

The message says what is wrong; `hint` says what to do. Both are single lines.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

__all__ = [
    "AgentUnreachable",
    "AgentUntrusted",
    "ArchiveFailed",
    "AttemptFailed",
    "CheckFailed",
    "CriuFailed",
    "GuestFault",
    "HoldBroken",
    "ImagesDamaged",
    "ImagesForbidden",
    "ImagesUnreachable",
    "ImagesUnsupported",
    "KernelNotFound",
    "LabError",
    "MoveInDoubt",
    "OvrError",
    "PidTaken",
    "RamNotShared",
    "TaskDied",
    "TreeDamaged",
    "Unreachable",
    "UsageError",
    "VerifyMismatch",
    "VmUnreachable",
]


class OvrError(Exception):
    """An error to be shown to the user.

    Attributes:
        exit_code: exit status of the command.
        hint: the cure, or an empty string.
        code: the exact cause, where one class is not enough, or an empty string; see docs/json.md.
        undone: for an aborted restore, the outcome of reverting its writes to kernel objects that
            may outlive the tree; see docs/json.md.
        move: the id of the move that is in doubt, or an empty string.
    """

    exit_code: ClassVar[int] = 1
    undone: Sequence[Mapping[str, Any]] = ()
    code: str = ""
    move: str = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def kind(self) -> str:
        """The class name, for scripts that read JSON output."""
        return type(self).__name__


class UsageError(OvrError):
    """The command line is invalid."""

    exit_code = 2


class ImagesForbidden(UsageError):
    """No permission to read the images."""


class Unreachable(OvrError):
    """A peer or a disk does not answer."""

    exit_code = 3


class ImagesUnreachable(Unreachable):
    """The disk or file server that has the images fails."""


class VmUnreachable(Unreachable):
    """There is no such VM, or its QMP socket does not answer."""


class AgentUnreachable(Unreachable):
    """No agent answers in the guest, or the link to it broke."""


class AgentUntrusted(AgentUnreachable):
    """The peer is not the agent run by root of this guest."""

    def __init__(self, message: str, hint: str, code: str) -> None:
        super().__init__(message, hint)
        self.code = code


class CheckFailed(OvrError):
    """This VM cannot be dumped from or restored into; or a move cannot be made, or decided so."""

    exit_code = 4


class RamNotShared(CheckFailed):
    """The guest's RAM is not backed by a shared mapping of a file."""


class KernelNotFound(CheckFailed):
    """No Linux kernel was found in guest RAM, or its types do not fit."""


class ImagesUnsupported(OvrError):
    """The images are valid but hold content that cannot be restored."""

    exit_code = 5


class ImagesDamaged(OvrError):
    """The images contradict themselves or the format."""

    exit_code = 6


class VerifyMismatch(OvrError):
    """Memory or state read back differs from the content written."""

    exit_code = 7


class ArchiveFailed(OvrError):
    """A dumped container has ended, but its archive is incomplete: the images are kept."""

    exit_code = 8
    code = "archive"


class MoveInDoubt(OvrError):
    """The source's tree is frozen, and that of the destination may run, or does."""

    exit_code = 9
    code = "in-doubt"

    def __init__(self, message: str, hint: str, move: str) -> None:
        super().__init__(message, hint)
        self.move = move


class GuestFault(OvrError):
    """Guest memory holds something impossible, or an address is not mapped.

    Attributes:
        address: the guest address (virtual or physical) at fault.
    """

    def __init__(self, message: str, address: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.address = address


class AttemptFailed(OvrError):
    """A restore was aborted, and the half-restored tree killed; or a dump, and the tree runs on."""


class HoldBroken(AttemptFailed):
    """The VM ran, or may have run, during a hold.

    Attributes:
        after_writes: whether it ran only after the last write of the hold had ended.
    """

    after_writes = False


class PidTaken(AttemptFailed):
    """A pid that the images need is in use in the guest."""


class TreeDamaged(AttemptFailed):
    """A dump failed, and its tree may not run as before, or not at all."""


class TaskDied(AttemptFailed):
    """A task of the guest has died."""


class CriuFailed(AttemptFailed):
    """CRIU in the guest failed before it held the tree.

    Attributes:
        file: the path, without its first slash, of a file that differs from its state at the dump,
            if that is the cause.
        unread_config: CRIU's configuration files in the guest that were not read, by path.
    """

    file: str | None = None
    unread_config: Mapping[str, str] = MappingProxyType({})


class LabError(OvrError):
    """The lab could not be set up or used."""
