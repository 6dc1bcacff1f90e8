"""A VM under libvirt, named as in ``virsh list``.

libvirt owns the QMP monitor of its domains, so QMP commands are passed through it (``virsh
qemu-monitor-command``), with one process for each command. Only queries are sent; libvirt marks the
domain as tainted (``custom-monitor``) all the same, which changes nothing but its log.

virsh selects the libvirtd: ``LIBVIRT_DEFAULT_URI``, else the system's for root and the session's
for others.

libvirt has no query for the pid of a domain's QEMU. It is the process with the domain's UUID on its
command line that runs as the domain's user; any other user can show the UUID, too.
"""

import json
import os
import pwd
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ovr.errors import VmUnreachable
from ovr.vm.processes import AGENT_CHANNEL, qemu_processes
from ovr.vm.qmp import Monitor

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__all__ = ["Domain", "LibvirtMonitor", "find_domain"]

_INSTALL: Final = "apt-get install libvirt-clients"
_OTHER_URI: Final = "is libvirtd up? LIBVIRT_DEFAULT_URI selects it"


@dataclass(frozen=True)
class Domain:
    """A running libvirt domain.

    Attributes:
        name: its name.
        uuid: its UUID, which stays when it is renamed.
        agent: the address that the guest's agent would have, in the form of ``--agent``, from the
            domain's XML: its vsock CID, or the socket of a channel named ``org.ovr.0``.
        uid: the user of its QEMU; None if it is not in the XML, and libvirt did not change it.
    """

    name: str
    uuid: str
    agent: str | None
    uid: int | None = None


def find_domain(name: str, timeout: float = 10.0) -> Domain:
    """Return the domain with this name, UUID or id.

    Args:
        name: in any form that virsh accepts.
        timeout: seconds that libvirt may take.

    Raises:
        VmUnreachable: there is none, it does not run, or libvirt cannot be asked.
    """
    from xml.etree import ElementTree  # noqa: PLC0415 - for libvirt: only

    text = _virsh(name, "dumpxml", "--domain", name, timeout=timeout)
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise VmUnreachable(f"libvirt's XML of {name} is invalid: {error}") from error
    found = Domain(root.findtext("name", name), root.findtext("uuid", ""), _agent(root), _uid(root))
    if root.get("type") not in ("qemu", "kvm"):
        raise VmUnreachable(f"the libvirt domain {found.name} is no QEMU: {root.get('type')}")
    if root.get("id") is None:
        raise VmUnreachable(
            f"the libvirt domain {found.name} does not run", f"virsh start {found.name}"
        )
    return found


class LibvirtMonitor(Monitor):
    """The QMP monitor of a domain, through libvirt.

    Args:
        domain: the domain.
        timeout: seconds to wait for each answer.

    Raises:
        VmUnreachable: its QEMU is not a process of this host.
    """

    def __init__(self, domain: Domain, timeout: float = 10.0) -> None:
        self._domain = domain
        self._timeout = timeout
        uid = os.geteuid() if domain.uid is None else domain.uid
        pids = [
            process.pid
            for process in qemu_processes()
            if process.uuid == domain.uuid and process.uid == uid
        ]
        if len(pids) != 1:
            raise VmUnreachable(
                f"{len(pids) or 'no'} QEMU processes of user {uid} here have the UUID of"
                f" {domain.name}",
                "run ovr on the host of the VM, where its processes can be seen",
            )
        self._pid = pids[0]

    def close(self) -> None:
        """Nothing to do: there is no connection."""

    @property
    def qemu_pid(self) -> int:
        """The pid of the process that has the domain's UUID on its command line."""
        return self._pid

    def ask(self, queries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Run queries; see `Monitor.ask`. In parallel: each has to start virsh."""
        with ThreadPoolExecutor(max(len(queries), 1)) as pool:
            return dict(zip(queries, pool.map(self._asked, queries, queries.values()), strict=True))

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return its ``return`` value; see `Monitor.execute`."""
        message = json.dumps(self._message(command, arguments))  # libvirt gives it an id
        domain = ("--domain", self._domain.uuid)
        words = ("qemu-monitor-command", *domain, "--cmd", message)
        text = _virsh(self._domain.name, *words, timeout=self._timeout)
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._unreachable("sent an answer that is not QMP") from error
        if not isinstance(answer, dict):
            raise self._unreachable("sent an answer that is not QMP")
        return self._returned(command, answer)

    def _unreachable(self, what: str) -> VmUnreachable:
        return VmUnreachable(f"the libvirt domain {self._domain.name} {what}", _OTHER_URI)


def _virsh(name: str, *words: str, timeout: float) -> str:
    try:
        done = subprocess.run(
            ["virsh", "--quiet", *words],
            env={**os.environ, "LC_ALL": "C.UTF-8"}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=timeout, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise VmUnreachable("virsh, libvirt's client, is not installed", _INSTALL) from error
    except subprocess.TimeoutExpired as error:
        raise VmUnreachable(
            f"libvirt does not answer for the domain {name} within {timeout:g} s", _OTHER_URI
        ) from error
    if done.returncode == 0:
        return done.stdout
    lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"virsh exits with {done.returncode}"
    if "failed to connect" in done.stderr:
        raise VmUnreachable(f"libvirt cannot be reached: {reason}", _OTHER_URI)
    raise VmUnreachable(f"libvirt refuses, for the domain {name}: {reason}", "virsh list --all")


def _uid(root: "Element") -> int | None:
    # "+64055:+64055", or names; libvirt puts the label of the running QEMU there (qemu_security.c).
    label = root.findtext("seclabel[@model='dac']/label")
    if label is None:
        return None
    user = label.partition(":")[0]
    try:
        return int(user.removeprefix("+")) if user.startswith("+") else pwd.getpwnam(user).pw_uid
    except (ValueError, KeyError) as error:
        raise VmUnreachable(
            f"libvirt runs the domain as user {user!r}, which has no uid here"
        ) from error


def _agent(root: "Element") -> str | None:
    cid = root.find("devices/vsock/cid")
    if cid is not None and (address := cid.get("address")):
        return f"vsock:{address}"
    for channel in root.iterfind("devices/channel[@type='unix']"):
        target, source = channel.find("target"), channel.find("source")
        if target is None or source is None or target.get("name") != AGENT_CHANNEL:
            continue
        if path := source.get("path"):
            return f"serial:{path}"
    return None
