"""The Python interface, for scripts that wrap CRIU.

::

    import ovr
    with ovr.attach("qmp:/run/vm/qmp.sock") as vm:
        report = vm.restore("images/", agent="vsock:3")
"""

from collections.abc import Sequence
from pathlib import Path

from ovr.report import Report, Stopwatch
from ovr.restore import restore
from ovr.vm.attach import AttachedVm

__all__ = ["Vm", "attach"]


class Vm(AttachedVm):
    """A VM that can be restored into; a context manager. Made by `attach`."""

    def __init__(
        self, spec: str, *, vmlinux: str | Path | None = None, watch: Stopwatch | None = None
    ) -> None:
        self._watch = watch or Stopwatch()
        with self._watch("attach"):
            super().__init__(spec, writable=True, vmlinux=vmlinux)

    def restore(
        self,
        images: str | Path,
        *,
        agent: str | None = None,
        outside: Sequence[str] = ("all",),
        verify: str = "sample",
        criu_options: Sequence[str] = (),
        log_level: int = 2,
    ) -> Report:
        """Restore what ``criu dump -D`` wrote and let it run; see `ovr.restore.restore`.

        Raises:
            OvrError: what went wrong. The tree was killed, the VM runs on, the images are as they
                were.
        """
        watch, self._watch = self._watch, Stopwatch()
        return restore(
            self, Path(images), agent=agent, outside=outside, verify=verify,
            criu_options=criu_options, log_level=log_level, watch=watch,
        )  # fmt: skip


def attach(spec: str, *, vmlinux: str | Path | None = None, watch: Stopwatch | None = None) -> Vm:
    """Attach to a running VM for restoring.

    Args:
        spec: ``libvirt:DOMAIN``, ``name:NAME``, ``qmp:PATH``, ``pid:N`` or ``lab:NAME``.
        vmlinux: the guest's kernel, if the guest keeps no symbols or types in its memory.
        watch: measures the attaching and the first restore; one of one's own can show progress.

    Raises:
        UsageError: `vmlinux` is no such file.
        VmUnreachable: no such VM.
        CheckFailed: it cannot be restored into.
    """
    return Vm(spec, vmlinux=vmlinux, watch=watch)
