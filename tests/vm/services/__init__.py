"""Real software from the guest's distribution, to be dumped, restored and asked.

How a service goes from VM A to a fresh VM B::

    vm = lab.up("a", suite=suite, share=shared, packages=PACKAGES[suite])
    service.prepare(vm)
    pid = service.start(vm)
    dump(vm, service, pid, f"{SHARE}/{service.name}")
    pack(vm, service, archive)

    service.prepare(vm_b)
    unpack(vm_b, service, archive)      # before each restore
    restore_plain(vm_b, service, …)     # or a restore from outside
    service.check(vm_b)
    service.end(vm_b)
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from tests.vm.services.base import Service
from tests.vm.services.jvm import Jvm
from tests.vm.services.lab import dump, pack, restore_plain, unpack
from tests.vm.services.nginx import Nginx
from tests.vm.services.postgres import Postgres
from tests.vm.services.python import Python
from tests.vm.services.redis import Redis

__all__ = [
    "HARDWARE", "PACKAGES", "SERVICES", "Service", "dump", "pack", "packages", "restore_plain",
    "unpack",
]  # fmt: skip

SERVICES: Mapping[str, Service] = MappingProxyType(
    {one.name: one for one in (Redis(), Nginx(), Python(), Postgres(), Jvm())}
)
"""All services, by name."""

HARDWARE: Mapping[str, str | int] = MappingProxyType({"memory": "2G", "cpus": 1})
"""What they run on.

One vCPU: where code is patched while another vCPU runs it, QEMU's TCG may execute what was there
before. So a JVM crashes now and then on two (1 of 7 starts, before anybody dumped it).
"""

_VERSIONS = {"trixie": (17, 21), "bookworm": (15, 17)}


def packages(suite: str, names: Iterable[str] = SERVICES) -> tuple[str, ...]:
    """Return the packages of an image for some services and their clients, for `ovr.lab.up`."""
    postgres, java = _VERSIONS[suite]
    own = {
        "redis": ("redis-server",),
        "nginx": ("nginx-light",),
        "postgres": (f"postgresql-{postgres}",),
        "jvm": ("ecj", f"openjdk-{java}-jre-headless"),
    }
    return "python3", *(package for name in names for package in own.get(name, ()))


PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {suite: packages(suite) for suite in _VERSIONS}
)
"""Packages of the one image for all of them, by suite."""
