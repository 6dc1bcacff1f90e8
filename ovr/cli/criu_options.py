"""Accept the options of ``criu restore`` and ``criu dump``: scripts for them need not change.

CRIU parses the same options for all its commands. `RESTORE` and `DUMP` have all options of CRIU
3.17 to 4.2 (criu/config.c, crtools.c), each with its handling: it is an option of ovr, is passed to
the guest's CRIU, is ignored, or is refused with the reason. The parsers, the help and
docs/criu-scripts.md are made from these tables.
"""

import argparse
import enum
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from ovr.cli import logs

__all__ = [
    "DUMP",
    "RESTORE",
    "TABLES",
    "Fate",
    "Option",
    "Table",
    "Verbosity",
    "add_criu_options",
    "add_verbosity",
]


class Fate(enum.Enum):
    """The handling of an option, in the words of docs/criu-scripts.md."""

    OURS = "an option of `ovr`"
    PASSED = "goes to the guest's CRIU"
    IGNORED = "changes nothing"
    REFUSED = "refused"


class Option(NamedTuple):
    """One option of a command of CRIU's.

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


Table = tuple[Option, ...]


def _options(fate: Fate, why: str, words: str) -> Iterator[Option]:
    # ``-x/--ext-unix-sk?``: names, and whether it takes a value ("=") or may take one ("?").
    for word in words.split():
        value = {"=": "1", "?": "?"}.get(word[-1])
        yield Option(tuple(word.rstrip("=?").split("/")), value, fate, why)


_ON_HOST: Final = "the restored process is in the guest, its parent cannot be on the host"
_NO_CONFIG: Final = "--no-default-config"
_FROM_A_DIRECTORY: Final = "ovr reads images from a directory"

RESTORE: Final[Table] = (
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


def _dump_options(fate: Fate, why: str, words: str) -> Iterator[Option]:
    # Names and values are those of the table of `criu restore`.
    known = {option.long: option for option in RESTORE}
    for word in words.split():
        yield known[word]._replace(fate=fate, why=why)


_TO_A_DIRECTORY: Final = "ovr writes images to a directory of the host"

DUMP: Final[Table] = (
    *_dump_options(Fate.OURS, "the root task, by its pid in the guest", "--tree"),
    *_dump_options(
        Fate.OURS, "the images' directory, on the host; it must exist, and have no images",
        "--images-dir",
    ),
    *_dump_options(Fate.OURS, "let the tree run on after the dump", "--leave-running"),
    *_dump_options(
        Fate.OURS, "directory of the files below; by default the images' directory, as with CRIU",
        "--work-dir",
    ),
    *_dump_options(
        Fate.OURS, "the log, in CRIU's format: `(00.012345) Error (file:line): …`; a new one"
        " has mode 0600, as CRIU's", "--log-file"
    ),
    *_dump_options(Fate.OURS, "CRIU's levels, `-v0` … `-v4`", "--verbosity"),
    *_dump_options(
        Fate.OURS, "time in seconds for the guest's CRIU to save all but the memory; without it,"
        " CRIU may take as long as it makes progress", "--timeout"
    ),
    *_dump_options(Fate.OURS, "prints the statistics of `stats-dump`", "--display-stats"),
    *_dump_options(Fate.OURS, "the help of `ovr dump`", "--help"),
    *_dump_options(
        Fate.PASSED, "paths and names in its value are the guest's",
        """--shell-job --file-locks --tcp-established --tcp-close --skip-in-flight --link-remap
        --evasive-devices --force-irmap --irmap-scan-path --ghost-limit --ghost-fiemap
        --enable-external-sharing --enable-external-masters --allow-uprobes --deprecated
        --external --ext-mount-map --ext-unix-sk --libdir --empty-ns --enable-fs --skip-mnt
        --freeze-cgroup --manage-cgroups --cgroup-dump-controller --cgroup-props
        --cgroup-props-file --cgroup-yard --lsm-profile --cpu-cap --file-validation
        --network-lock""",
    ),
    *_dump_options(Fate.IGNORED, "there is one log", "--log-pid --relative-timestamps"),
    *_dump_options(
        Fate.IGNORED,
        "CRIU's configuration files are never read; with it, `ovr` does not report them",
        _NO_CONFIG,
    ),
    *_dump_options(Fate.IGNORED, "the agent runs CRIU as root", "--unprivileged"),
    *_dump_options(Fate.IGNORED, "no descriptor of the caller reaches CRIU", "--close"),
    *_dump_options(
        Fate.IGNORED, "an option of `criu restore`, which `criu dump` accepts and ignores",
        """--restore-detached --daemon --restore-sibling --pidfile --root --join-ns --inherit-fd
        --veth-pair --weak-sysctls --skip-file-rwx-check --mntns-compat-mode --cgroup-root
        --lsm-mount-context""",
    ),
    *_dump_options(
        Fate.IGNORED, "an option of `criu pre-dump`, which `criu dump` accepts and ignores",
        "--pre-dump-mode",
    ),
    *_dump_options(
        Fate.IGNORED, "an option of `criu check`, which `criu dump` accepts and ignores",
        "--ms --extra --experimental --all --feature",
    ),
    *_dump_options(
        Fate.REFUSED, "ovr ends the tree, or lets it run on (-R); a tree that is to stay stopped"
        " must be stopped before, in the guest: kill -STOP PID, then dump with -R",
        "--leave-stopped",
    ),
    *_dump_options(
        Fate.REFUSED, "all memory is in the images that ovr writes, none in those of an earlier"
        " dump; omit the option, and dump into an empty directory", "--prev-images-dir",
    ),
    *_dump_options(
        Fate.REFUSED, "ovr never builds on an earlier dump, so none needs to be tracked for;"
        " omit the option", "--track-mem",
    ),
    *_dump_options(
        Fate.REFUSED, "all pages are in the images when ovr ends; omit the option", "--lazy-pages"
    ),
    *_dump_options(
        Fate.REFUSED, "there are no earlier images that share pages; omit the option",
        "--auto-dedup",
    ),
    *_dump_options(
        Fate.REFUSED, "it would run on the host; the agent uses CRIU's hooks in the guest. Do"
        " before and after ovr what the script does", "--action-script",
    ),
    *_dump_options(
        Fate.REFUSED, "wait for ovr to end: then the images are complete", "--status-fd"
    ),
    *_dump_options(Fate.REFUSED, "as by criu dump: it is for criu restore", "--exec-cmd"),
    *_dump_options(
        Fate.REFUSED, f"{_TO_A_DIRECTORY}; send them from there",
        """--stream --page-server --address --port --ps-socket --tls --tls-cacert --tls-cacrl
        --tls-cert --tls-key --tls-no-cn-verify""",
    ),
    *_dump_options(Fate.REFUSED, "give its options on the command line", "--config"),
    *_dump_options(Fate.REFUSED, "`ovr check` shows the version of the guest's CRIU", "--version"),
)  # fmt: skip
"""The same options, after ``criu dump``."""


TABLES: Final = {"restore": RESTORE, "dump": DUMP}
"""By command of CRIU's."""


def _both() -> Iterator[Option]:
    ours = ("--tree", "--log-file", "--verbosity", "--timeout", "--help")
    passed = {option.long for option in RESTORE if option.fate is Fate.PASSED}
    for option in DUMP:
        if option.fate is Fate.OURS and option.long not in ours:
            why = "a move leaves no images, and no statistics; omit the option"
            yield option._replace(fate=Fate.REFUSED, why=why)
        elif option.long in passed:
            yield option._replace(fate=Fate.PASSED)
        else:
            yield option


MOVE: Final[Table] = tuple(_both())
"""The options of ``ovr move``, which go to both CRIUs."""

_TABLES: Final = {**TABLES, "dump and criu restore": MOVE}

_HIDDEN: Final = argparse.SUPPRESS  # the description of their group lists them


def _names(table: Table, fate: Fate) -> str:
    names = sorted(option.long for option in table if option.fate is fate)
    return textwrap.fill(" ".join(names), 78, break_on_hyphens=False)


def add_criu_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the options of a command of CRIU's that ovr's command does not have itself.

    Those for the guest's CRIU are collected in ``criu_options``.

    Args:
        parser: of ovr's command.
        command: ``restore``, ``dump``, or ``dump and criu restore``.
    """
    table = _TABLES[command]
    group = parser.add_argument_group(
        f"options of criu {command}",
        f"These go to the guest's CRIU (see criu(8)):\n{_names(table, Fate.PASSED)}\n"
        f"These change nothing here, and are accepted:\n{_names(table, Fate.IGNORED)}\n"
        f"Other options of criu {command} are refused, with the reason.",
    )
    group.set_defaults(criu_options=[])
    for option in table:
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
        why = option.why if option.fate is Fate.REFUSED else None
        group.add_argument(*names, action=action, nargs=nargs, const=why, help=_HIDDEN)


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add CRIU's ``-v`` in the place of ours."""
    parser.add_argument(
        "-v", "--verbosity", action=Verbosity, dest="log_level", nargs="?", metavar="NUM",
        default=logs.DEFAULT_LEVEL,
        help="log more (-vv: all), or criu's level: 0 nothing … 4 all",
    )  # fmt: skip
    parser.set_defaults(verbose=0)


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
    # Its constant is the reason.
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string} of criu cannot be honoured: {self.const}")
