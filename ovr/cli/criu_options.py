"""Accept the options of ``criu restore``, so that scripts written for it need not change.

`TABLE` has all options of CRIU 3.17 to 4.2 (criu/config.c, crtools.c), each with its handling: it
is an option of ovr, is passed to the guest's CRIU, is ignored, or is refused with the reason. The
parser, the help and docs/criu-scripts.md are made from the table.
"""

import argparse
import enum
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from ovr.cli import logs

__all__ = ["TABLE", "Fate", "Option", "Verbosity", "add_criu_options"]


class Fate(enum.Enum):
    """The handling of an option, in the words of docs/criu-scripts.md."""

    OURS = "an option of `ovr restore`"
    PASSED = "goes to the guest's CRIU"
    IGNORED = "changes nothing"
    REFUSED = "refused"


class Option(NamedTuple):
    """One option of ``criu restore``.

    Attributes:
        names: short and long names.
        value: None if it takes none, ``?`` if it may take one, ``1`` if it must.
        fate: its handling.
        why: the reason, or its effect in ovr.
    """

    names: tuple[str, ...]
    value: str | None
    fate: Fate
    why: str = ""

    @property
    def long(self) -> str:
        """Its long name, the last one."""
        return self.names[-1]


def _options(fate: Fate, why: str, words: str) -> Iterator[Option]:
    # ``-x/--ext-unix-sk?``: names, and whether it takes a value ("=") or may take one ("?").
    for word in words.split():
        value = {"=": "1", "?": "?"}.get(word[-1])
        yield Option(tuple(word.rstrip("=?").split("/")), value, fate, why)


_ON_HOST: Final = "the restored process is in the guest, its parent cannot be on the host"
_NO_CONFIG: Final = "--no-default-config"
_FROM_A_DIRECTORY: Final = "ovr reads images from a directory"

TABLE: Final[tuple[Option, ...]] = (
    *_options(Fate.OURS, "the images' directory, on the host; only read", "-D/--images-dir="),
    *_options(
        Fate.OURS, "directory of the files below; by default the images' directory, as with CRIU",
        "-W/--work-dir=",
    ),
    *_options(
        Fate.OURS, "the log, in CRIU's format: `(00.012345) Error (file:line): …`; a new one"
        " has mode 0600, as CRIU's", "-o/--log-file="
    ),
    *_options(Fate.OURS, "CRIU's levels, `-v0` … `-v4`", "-v/--verbosity?"),
    *_options(
        Fate.OURS, "file for the root task's pid, as the guest sees it; must not exist",
        "--pidfile=",
    ),
    *_options(
        Fate.OURS, "time in seconds for the guest to build the tree, without its memory;"
        " `criu restore` accepts and ignores it", "--timeout="
    ),
    *_options(Fate.OURS, "prints the statistics of `stats-restore`", "--display-stats"),
    *_options(Fate.OURS, "the help of `ovr restore`", "-h/--help"),
    *_options(
        Fate.PASSED, "paths and names in its value are the guest's",
        """-l/--file-locks --tcp-established --tcp-close --skip-in-flight
        --link-remap --evasive-devices --force-irmap --weak-sysctls --skip-file-rwx-check
        --mntns-compat-mode --enable-external-sharing --enable-external-masters --allow-uprobes
        --deprecated -r/--root= -J/--join-ns= -M/--ext-mount-map= -L/--libdir= --external=
        --empty-ns= --enable-fs= --skip-mnt= --veth-pair= --cgroup-root= --cgroup-props=
        --cgroup-props-file= --cgroup-yard= --lsm-profile= --lsm-mount-context=
        --irmap-scan-path= --ghost-limit= --file-validation= --network-lock= -x/--ext-unix-sk?
        --manage-cgroups? --cpu-cap?""",
    ),
    *_options(
        Fate.PASSED, "for a session leader that was not dumped; a terminal whose other end was"
        " not dumped is refused, with or without it",
        "-j/--shell-job",
    ),
    *_options(Fate.IGNORED, "`ovr` always detaches", "-d/--restore-detached --daemon"),
    *_options(Fate.IGNORED, "`ovr` finds the root in the images", "-t/--tree="),
    *_options(Fate.IGNORED, "there is one log", "--log-pid --relative-timestamps"),
    *_options(
        Fate.IGNORED,
        "CRIU's configuration files are never read; with it, `ovr` does not report them",
        _NO_CONFIG,
    ),
    *_options(Fate.IGNORED, "the agent runs CRIU as root", "--unprivileged"),
    *_options(Fate.IGNORED, "no descriptor of the caller reaches CRIU", "--close="),
    *_options(
        Fate.IGNORED, "an option of `criu dump`, which `criu restore` accepts and ignores",
        """-R/--leave-running --track-mem --prev-images-dir= --freeze-cgroup=
        --cgroup-dump-controller= --pre-dump-mode= --ghost-fiemap""",
    ),
    *_options(
        Fate.IGNORED, "an option of `criu check`, which `criu restore` accepts and ignores",
        "--ms --extra --experimental --all --feature=",
    ),
    *_options(
        Fate.REFUSED, "ovr lets the tree run; stop it in the guest: kill -STOP PID",
        "-s/--leave-stopped",
    ),
    *_options(Fate.REFUSED, _ON_HOST, "-S/--restore-sibling --exec-cmd"),
    *_options(
        Fate.REFUSED, "descriptors of this process cannot go into the guest", "--inherit-fd="
    ),
    *_options(Fate.REFUSED, "wait for ovr to end: then the tree runs", "--status-fd="),
    *_options(
        Fate.REFUSED, "it would run on the host; the agent uses CRIU's hooks in the guest",
        "--action-script=",
    ),
    *_options(
        Fate.REFUSED, "all pages are present when the tree runs; omit the option", "--lazy-pages"
    ),
    *_options(
        Fate.REFUSED, "ovr does not change images; omit the option", "--auto-dedup"
    ),
    *_options(
        Fate.REFUSED, _FROM_A_DIRECTORY,
        """--stream --page-server --address= --port= --ps-socket= --tls --tls-cacert= --tls-cacrl=
        --tls-cert= --tls-key= --tls-no-cn-verify""",
    ),
    *_options(Fate.REFUSED, "give its options on the command line", "--config="),
    *_options(Fate.REFUSED, "`ovr check` shows the version of the guest's CRIU",
              "-V/--version"),
)  # fmt: skip
"""Every option that some CRIU from 3.17 to 4.2 takes after ``criu restore``."""

_HIDDEN: Final = argparse.SUPPRESS  # the description of their group lists them


def _of(fate: Fate) -> list[Option]:
    return [option for option in TABLE if option.fate is fate]


def _names(fate: Fate) -> str:
    return textwrap.fill(
        " ".join(sorted(option.long for option in _of(fate))), 78, break_on_hyphens=False
    )


def add_criu_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``criu restore`` that ``ovr restore`` does not have itself.

    Those for the guest's CRIU are collected in ``criu_options``.
    """
    group = parser.add_argument_group(
        "options of criu restore",
        f"These go to the guest's CRIU (see criu(8)):\n{_names(Fate.PASSED)}\n"
        f"These change nothing here, and are accepted:\n{_names(Fate.IGNORED)}\n"
        "Other options of criu restore are refused, with the reason.",
    )
    group.set_defaults(criu_options=[])
    for option in TABLE:
        if option.fate is Fate.OURS:
            continue
        if option.long == _NO_CONFIG:
            group.add_argument(_NO_CONFIG, action="store_true", help=_HIDDEN)
            continue
        names = [*option.names]
        if option.fate is not Fate.REFUSED and option.value is None:
            names.append(f"--no-{option.long[2:]}")  # criu's BOOL_OPT() makes both
        action = {Fate.PASSED: _Pass, Fate.IGNORED: _Ignore, Fate.REFUSED: _Refuse}[option.fate]
        nargs: int | str | None = {None: 0, "?": "?", "1": None}[option.value]
        group.add_argument(*names, action=action, nargs=nargs, help=_HIDDEN)


class Verbosity(argparse.Action):
    """Parse CRIU's ``-v``: ``-vv`` counts, ``-v4`` is a level (0 silent … 4 all)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Set ``log_level``, a level of CRIU, and ``verbose``, as in all commands."""
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


class _Ignore(argparse.Action):
    def __call__(self, *_: object, **__: object) -> None:
        pass


class _Refuse(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        names = tuple(self.option_strings)
        why = next(option.why for option in _of(Fate.REFUSED) if option.names == names)
        parser.error(f"{option_string} of criu cannot be honoured: {why}")
