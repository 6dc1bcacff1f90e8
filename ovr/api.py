"""The Python interface, for scripts that wrap CRIU.

::

    import ovr
    with ovr.attach("qmp:/run/vm-a/qmp.sock") as vm:
        saved = vm.dump(4242, "images/", agent="vsock:3")
    with ovr.attach("qmp:/run/vm-b/qmp.sock") as vm:
        report = vm.restore("images/", agent="vsock:4")
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ovr.attempt.stopwatch import Stopwatch
from ovr.checkpoint import open_checkpoint
from ovr.dump import AS_MANY_AS_HELP, dump
from ovr.dump.container import to_dump
from ovr.dump.report import DumpReport
from ovr.move import DOWNTIME, MoveReport, move, to_move
from ovr.restore import restore
from ovr.restore.report import Report
from ovr.vm.attach import AttachedVm

__all__ = ["Vm", "attach"]


class Vm(AttachedVm):
    """A VM that can be dumped from and restored into; a context manager. Made by `attach`."""

    def __init__(
        self, spec: str, *, vmlinux: str | Path | None = None, watch: Stopwatch | None = None
    ) -> None:
        self._watch = watch or Stopwatch()
        with self._watch("attach"):
            super().__init__(spec, writable=True, vmlinux=vmlinux)

    def restore(
        self,
        images: str | Path | None = None,
        *,
        archive: str | Path | None = None,
        previous: str | Path | None = None,
        name: str | None = None,
        runtime: str | None = None,
        bundle: str | None = None,
        agent: str | None = None,
        outside: Sequence[str] = ("all",),
        verify: str = "sample",
        criu_options: Sequence[str] = (),
        engine_options: Sequence[str] = (),
        log_level: int = 2,
        timeout: float | None = None,
    ) -> Report:
        """Restore a checkpoint and let it run; see `ovr.restore.story.restore`.

        Args:
            images: what ``criu dump -D`` wrote,
            archive: or what ``podman container checkpoint --export`` wrote.
            previous: the pre-checkpoint on which `archive` builds, as an archive of its own.
            name: the container's new name.
            runtime: ``runc`` or ``crun``, where it shall restore the container, not podman,
            bundle: into this directory of the guest.
            agent: the agent's address; lab VMs know their own.
            outside: the kinds of state to write from outside, groups of them, or ``all``.
            verify: read back none of the memory, a ``sample``, or all (``full``).
            criu_options: further options for the guest's ``criu restore``, for `images`.
            engine_options: further options for its ``podman container restore`` or
                ``runc restore``.
            log_level: how much the guest's CRIU logs (its ``-v``), for `images`.
            timeout: seconds that the guest may take to build the tree, without its memory; None: as
                long as it makes progress.

        Raises:
            OvrError: what went wrong. The tree was killed, the VM runs on, the images are as they
                were.
        """
        watch, self._watch = self._watch, Stopwatch()
        with ExitStack() as stack:
            with watch("open"):
                checkpoint = stack.enter_context(
                    open_checkpoint(
                        images, archive=archive, previous=previous, name=name,
                        runtime=runtime, bundle=bundle, criu_options=criu_options,
                        engine_options=engine_options,
                    )
                )  # fmt: skip
            return restore(
                self, checkpoint, agent=agent, outside=outside, verify=verify,
                log_level=log_level, timeout=timeout, watch=watch,
            )  # fmt: skip

    def dump(
        self,
        pid: int | None = None,
        images: str | Path | None = None,
        *,
        container: str | None = None,
        export: str | Path | None = None,
        runtime: str | None = None,
        agent: str | None = None,
        leave_running: bool = False,
        pre_copies: int = 0,
        verify: str = "sample",
        criu_options: Sequence[str] = (),
        engine_options: Sequence[str] = (),
        log_level: int = 2,
        timeout: float | None = None,
    ) -> DumpReport:
        """Save a running tree or container, and end it; see `ovr.dump.story.dump`.

        Args:
            pid: the root task, in the guest's initial pid namespace,
            images: and an existing directory without images;
            container: or the name or id of a container of podman,
            export: and its archive: a new ``.tar``, ``.tar.zst`` or ``.tar.gz``; ``-``: standard
                output gets a ``.tar.zst``, and images that are kept go to the current directory.
            runtime: ``runc`` or ``crun``, where it runs the container without podman, which goes to
                `images`.
            agent: the agent's address; lab VMs know their own.
            leave_running: let the tree run on.
            pre_copies: copy pages while the tree runs, in so many rounds, or
                `ovr.dump.AS_MANY_AS_HELP`; the images then build on those in the subdirectories
                ``pre-copy-1`` and so on.
            verify: compare none of the memory with the images, a ``sample``, or all (``full``).
            criu_options: further options for the guest's ``criu dump``; for a container, only
                ``--tcp-established`` and ``--file-locks``.
            engine_options: further options for the engine's ``checkpoint``.
            log_level: how much the guest's CRIU logs (its ``-v``).
            timeout: seconds that CRIU may take; None: as long as it makes progress.

        Raises:
            ArchiveFailed: the container has ended, and its archive is incomplete; the images are
                kept.
            OvrError: what went wrong. The tree runs on, and there are no images.
        """
        tree, place = to_dump(
            pid, images, container=container, export=export, runtime=runtime,
            criu_options=criu_options, engine_options=engine_options,
        )  # fmt: skip
        watch, self._watch = self._watch, Stopwatch()
        return dump(
            self, tree, place, agent=agent, leave_running=leave_running,
            pre_copies=pre_copies, verify=verify,
            criu_options=criu_options if container is None else (), log_level=log_level,
            timeout=timeout, watch=watch,
        )  # fmt: skip

    def move(
        self,
        tree: int | str,
        to: AttachedVm,
        *,
        agent: str | None = None,
        to_agent: str | None = None,
        rounds: int = AS_MANY_AS_HELP,
        downtime: float = DOWNTIME,
        strict: bool = False,
        verify: str = "sample",
        check_cpu: bool = True,
        criu_options: Sequence[str] = (),
        log_level: int = 2,
        engine_options: Sequence[str] = (),
        timeout: float | None = None,
    ) -> MoveReport:
        """Move a running tree to another VM of this host; see `ovr.move.story.move`.

        Args:
            tree: the pid of the root task, in the guest's initial pid namespace; or the name or id
                of a container of podman's.
            to: the VM that gets it.
            agent: the agent's address; lab VMs know their own.
            to_agent: that of the other VM's agent.
            rounds: copy pages while the tree runs, in so many rounds, or
                `ovr.dump.AS_MANY_AS_HELP`.
            downtime: with the latter: seconds that it may take to copy what is left then.
            strict: let the tree stay where it is if more is left.
            verify: read back none of the memory, a ``sample``, or all (``full``).
            check_cpu: refuse a VM whose CPU lacks a feature of this one's.
            criu_options: further options for ``criu dump`` and ``criu restore``; for a container
                only ``--file-locks``.
            log_level: how much both guests' CRIUs log (their ``-v``).
            engine_options: further options for ``podman container checkpoint`` and ``restore``.
            timeout: seconds that either CRIU may take; None: as long as it makes progress.

        Raises:
            MoveInDoubt: the tree may run in the other VM, or does, and is here too, frozen.
            OvrError: what went wrong. The tree runs on here, and the other VM is as it was.
        """
        what = to_move(tree, criu_options=criu_options, engine_options=engine_options)
        watch, self._watch = self._watch, Stopwatch()
        return move(
            self, to, what, source_agent=agent, destination_agent=to_agent, rounds=rounds,
            downtime=downtime, strict=strict, verify=verify, check_cpu=check_cpu,
            criu_options=criu_options, log_level=log_level, timeout=timeout, watch=watch,
        )  # fmt: skip


def attach(spec: str, *, vmlinux: str | Path | None = None, watch: Stopwatch | None = None) -> Vm:
    """Attach to a running VM for dumps and restores.

    Args:
        spec: ``libvirt:DOMAIN``, ``name:NAME``, ``qmp:PATH``, ``pid:N`` or ``lab:NAME``.
        vmlinux: the guest's kernel, if the guest keeps no symbols or types in its memory.
        watch: measures the attaching and the first dump or restore; a subclass can show progress.

    Raises:
        UsageError: `vmlinux` is no such file.
        VmUnreachable: no such VM.
        CheckFailed: it cannot be used.
    """
    return Vm(spec, vmlinux=vmlinux, watch=watch)
