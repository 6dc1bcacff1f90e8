"""Write the host and domain name of a UTS namespace."""

from typing import Any, Final

from ovr.errors import ImagesDamaged
from ovr.images.objects import UtsnsEntry
from ovr.state.kind import Kind
from ovr.state.scope import UTS

__all__ = ["KINDS", "Domainname", "Nodename"]

_LENGTH: Final = 64  # __NEW_UTS_LEN


class _Name(Kind):
    """A name in ``struct new_utsname``."""

    groups = ("container",)
    source = "prepare_utsns() in criu/uts_ns.c; sys_sethostname()"
    scope = UTS
    field: str

    def take(self, image: UtsnsEntry) -> str:
        """Return the name; bytes that are not UTF-8 become surrogates."""
        name: bytes = getattr(image, self.field)
        if len(name) > _LENGTH or b"\0" in name:
            raise ImagesDamaged(f"{self.field} has more than {_LENGTH} bytes", "dump again")
        return name.decode(errors="surrogateescape")

    def neutralise(self, image: UtsnsEntry) -> None:
        """Set ``ovr-neutral``."""
        setattr(image, self.field, b"ovr-neutral")

    def write(self, target: Any, value: str) -> None:
        """Store as sys_sethostname() does under uts_sem."""
        # SAFETY: the namespace is not the VM's own but was made by CRIU for this tree, whose tasks
        # are stopped; another process that has just joined it may read the old name, the new one,
        # or parts of both. Undone by killing the tree, which ends the namespace.
        setattr(target.name, self.field, value)

    def read(self, target: Any) -> str:
        return str(getattr(target.name, self.field))


class Nodename(_Name):
    """sethostname(2)."""

    name = "nodename"
    summary = "host name (uts_namespace.name.nodename)"
    field = "nodename"


class Domainname(_Name):
    """setdomainname(2)."""

    name = "domainname"
    summary = "NIS domain name (uts_namespace.name.domainname)"
    field = "domainname"


KINDS: Final = (Nodename(), Domainname())
