"""The options of ``criu restore``, so that scripts written for it need not change.

Those that mean something on the host are ovr's own (``-D -W -o -v -d --pidfile --display-stats``).
Those about the guest go to the guest's CRIU. Those that ovr cannot honour are refused, each with
the reason. What CRIU takes is in its criu/config.c and crtools.c (3.17 to 4.2).
"""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ovr.cli import logs

__all__ = ["PASSED", "REFUSED", "Verbosity", "add_criu_options"]

_FLAGS: Final[tuple[tuple[str, ...], ...]] = (
    ("-j", "--shell-job"),
    ("-l", "--file-locks"),
    ("--tcp-established",),
    ("--tcp-close",),
    ("--skip-in-flight",),
    ("--link-remap",),
    ("--evasive-devices",),
    ("--force-irmap",),
    ("--weak-sysctls",),
    ("--skip-file-rwx-check",),
    ("--mntns-compat-mode",),
    ("--enable-external-sharing",),
    ("--enable-external-masters",),
    ("--allow-uprobes",),
    ("--deprecated",),
)
_VALUES: Final[tuple[tuple[str, ...], ...]] = (
    ("-r", "--root"),
    ("-J", "--join-ns"),
    ("-M", "--ext-mount-map"),
    ("-L", "--libdir"),
    ("--external",),
    ("--empty-ns",),
    ("--enable-fs",),
    ("--skip-mnt",),
    ("--veth-pair",),
    ("--cgroup-root",),
    ("--cgroup-props",),
    ("--cgroup-props-file",),
    ("--cgroup-yard",),
    ("--lsm-profile",),
    ("--lsm-mount-context",),
    ("--irmap-scan-path",),
    ("--ghost-limit",),
    ("--file-validation",),
    ("--network-lock",),
)
_MAYBE_VALUES: Final[tuple[tuple[str, ...], ...]] = (
    ("-x", "--ext-unix-sk"),
    ("--manage-cgroups",),
    ("--cpu-cap",),
)

PASSED: Final[tuple[str, ...]] = tuple(names[-1] for names in (*_FLAGS, *_VALUES, *_MAYBE_VALUES))
"""What goes on to the guest's CRIU, by long name."""

_IGNORED_FLAGS: Final[tuple[tuple[str, ...], ...]] = (
    ("-d", "--restore-detached"),
    ("--log-pid",),
    ("--no-default-config",),
    ("--relative-timestamps",),
    # Of dumps; criu restore takes them and does nothing with them.
    ("-R", "--leave-running"),
    ("--track-mem",),
)
_IGNORED_VALUES: Final[tuple[tuple[str, ...], ...]] = (
    ("-t", "--tree"),
    ("--prev-images-dir",),
    ("--timeout",),
    ("--freeze-cgroup",),
)

_ON_HOST: Final = "the restored process is in the guest, its parent cannot be on the host"
REFUSED: Final[Mapping[tuple[str, ...], str]] = {
    ("-s", "--leave-stopped"): "ovr lets the tree run; stop it in the guest: kill -STOP PID",
    ("-S", "--restore-sibling"): _ON_HOST,
    ("--exec-cmd",): _ON_HOST,
    ("--inherit-fd",): "descriptors of this process cannot go into the guest",
    ("--status-fd",): "wait for ovr to end: the tree runs then",
    ("--action-script",): "it would run on the host; CRIU's hooks in the guest are the agent's",
    ("--lazy-pages",): "all pages are there when the tree runs; leave the option out",
    ("--auto-dedup",): "ovr does not change images; leave the option out",
    ("--stream",): "ovr reads images from a directory",
    ("--page-server",): "ovr reads images from a directory",
    ("--config",): "write its options on the command line",
}
"""What cannot be honoured, and what to do instead."""

_WITHOUT_VALUE: Final = {"--leave-stopped", "--restore-sibling", "--exec-cmd", "--lazy-pages",
                         "--auto-dedup", "--stream", "--page-server"}  # fmt: skip


_HIDDEN: Final = argparse.SUPPRESS  # named in the text above them
_HELP: Final = f"""\
These go to the guest's CRIU (see criu(8)):
{textwrap.fill(" ".join(sorted(PASSED)), 78, break_on_hyphens=False)}
These change nothing here, and are accepted: -d, -t, --log-pid, --timeout and the like.
Others are refused, with the reason."""


def add_criu_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``criu restore`` takes and ``ovr restore`` has no option of its own for.

    What goes on to the guest's CRIU is collected in ``criu_options``.
    """
    group = parser.add_argument_group("options of criu restore", _HELP)
    group.set_defaults(criu_options=[])
    for names in _FLAGS:
        group.add_argument(*names, f"--no-{names[-1][2:]}", action=_Pass, nargs=0, help=_HIDDEN)
    for names in _VALUES:
        group.add_argument(*names, action=_Pass, help=_HIDDEN)
    for names in _MAYBE_VALUES:
        group.add_argument(*names, action=_Pass, nargs="?", help=_HIDDEN)
    for names in _IGNORED_FLAGS:
        group.add_argument(*names, action="store_true", dest="ignored", help=_HIDDEN)
    for names in _IGNORED_VALUES:
        group.add_argument(*names, dest="ignored", help=_HIDDEN)
    for names in REFUSED:
        nargs = 0 if names[-1] in _WITHOUT_VALUE else None
        group.add_argument(*names, action=_Refuse, nargs=nargs, help=_HIDDEN)


class Verbosity(argparse.Action):
    """CRIU's ``-v``: ``-vv`` counts, ``-v4`` is a level (0 silent … 4 all)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Set ``log_level`` in CRIU's numbers, and ``verbose`` as all commands have it."""
        now: int = namespace.log_level
        if values is None:
            level = now + 1
        elif isinstance(values, str) and values.isascii() and values.isdecimal():
            level = int(values)
        elif isinstance(values, str) and set(values) == {"v"}:
            level = now + 1 + len(values)
        else:
            parser.error(f"-v takes a level from 0 to 4, not {values!r}")
        namespace.log_level = min(level, 4)
        namespace.verbose = max(namespace.log_level - logs.DEFAULT_LEVEL, 0)


class _Pass(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        typed = option_string or ""
        if not typed.startswith("--"):
            typed = next(text for text in self.option_strings if text.startswith("--"))
        word = f"{typed}={values}" if isinstance(values, str) else typed
        namespace.criu_options = [*namespace.criu_options, word]


class _Refuse(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        reason = REFUSED[tuple(self.option_strings)]
        parser.error(f"{option_string} of criu cannot be honoured: {reason}")
