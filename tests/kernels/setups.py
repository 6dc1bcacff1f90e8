"""The setups of the kernel matrix: a guest's suite, its kernel, and the machine it runs on."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["CANNOT", "SETUPS", "Setup", "in_turn"]

CLOUD, GENERIC, RT = "linux-image-cloud-amd64", "linux-image-amd64", "linux-image-rt-amd64"
ODD = "1058824K"  # 1034 MiB and 8 KiB: no whole number of huge pages


@dataclass(frozen=True)
class Setup:
    """One row of the matrix.

    Attributes:
        suite: of the guest, and with it of its CRIU.
        kernel: as `ovr.lab.up` takes it; "" is the suite's own cloud kernel.
        memory: the guest's RAM.
        hardware: further arguments of `ovr.lab.up`.
        refused: the kernel is older than what is supported; `ovr check` has to refuse it.
    """

    suite: str
    kernel: str = ""
    memory: str = "1G"
    hardware: dict[str, Any] = field(default_factory=dict)
    refused: bool = False

    @property
    def machine(self) -> str:
        """The unusual properties of the machine."""
        words = [f"{name}={value}" for name, value in self.hardware.items()]
        return " ".join([*words, *([f"memory={self.memory}"] if self.memory != "1G" else [])])

    @property
    def name(self) -> str:
        """A name that no other setup has."""
        return " ".join(filter(None, (self.suite, self.kernel or CLOUD, self.machine)))


def backport(version: str, flavour: str = "cloud-") -> str:
    """Return the name of a kernel package of trixie-backports."""
    return f"linux-image-{version}+deb13-{flavour}amd64/trixie-backports"


SETUPS: tuple[Setup, ...] = (
    Setup("bookworm"),
    Setup("bookworm", GENERIC),
    Setup("bookworm", RT),
    Setup("bookworm", f"{CLOUD}/bookworm-backports"),
    Setup("bookworm", f"{RT}/bookworm-backports"),
    Setup("trixie"),
    Setup("trixie", GENERIC),
    Setup("trixie", RT),
    Setup("trixie", backport("6.16.12")),
    Setup("trixie", backport("6.17.13")),
    Setup("trixie", backport("6.18.15")),
    Setup("trixie", backport("7.2.12")),
    Setup("trixie", backport("7.3.4")),
    Setup("trixie", f"{GENERIC}/trixie-backports"),
    Setup("trixie", f"{RT}/trixie-backports"),
    Setup("forky"),
    Setup("forky", GENERIC),
    Setup("forky", RT),
    Setup("forky", f"{CLOUD}/sid"),
    Setup("forky", f"{CLOUD}/experimental"),
    Setup("forky", f"{RT}/experimental"),
    Setup("bookworm", hardware={"la57": False, "append": "nokaslr", "numa": 2}),
    Setup("trixie", hardware={"la57": False}),
    Setup("trixie", hardware={"la57": True, "append": "nokaslr"}),
    Setup("trixie", hardware={"numa": 2}),
    Setup("trixie", hardware={"backend": "memfd"}),
    Setup("trixie", hardware={"backend": "memfd", "numa": 2}),
    Setup("trixie", hardware={"backend": "hugetlbfs"}),
    Setup("trixie", memory=ODD),
    Setup("trixie", f"{RT}/trixie-backports", hardware={"la57": False, "numa": 2}),
    Setup("forky", f"{RT}/experimental", hardware={"append": "nokaslr", "backend": "memfd"}),
    Setup("bookworm", f"{GENERIC}/bullseye-security", refused=True),
)

CANNOT = {
    "Linux 6.2 to 6.11, 6.13 to 6.15": "no longer in any release of Debian",
    "Linux 6.19 to 7.1": "trixie-backports still has the kernels, but not the packages with the"
    " modules needed to access the disk",
    "Linux 6.1 of bullseye-security": "listed, but not in the archive when this was recorded",
    "Linux before 5.19": "no PG_anon_exclusive; refused before anything is written, see 5.10 above",
    "arm64, i386": "ovr is for x86-64 hosts and guests",
    "KVM": "not recorded yet: the machines used had no /dev/kvm that boots a guest",
}
"""Setups that the matrix cannot have, each with its reason."""


def in_turn(number: int, count: int = 1) -> list[Setup]:
    """Return `count` setups that anything can run; the next `number` gives the next ones.

    Not those that need pages reserved on the host or have to be refused, and not the suites' own
    kernels on the usual machine: other tests have these. Nor kernels of other releases: backports
    and unstable ones are replaced in the archive at any time.
    """
    usual = [
        one
        for one in SETUPS
        if not one.refused
        and (one.kernel or one.machine)
        and "/" not in one.kernel
        and one.hardware.get("backend") != "hugetlbfs"
    ]
    return [usual[(number * count + step) % len(usual)] for step in range(count)]
