"""Find options in the guest's CRIU configuration files that a command line lacks.

A dump, and a restore without an engine, do not read these files (docs/criu-scripts.md explains
why). So the user is told that they exist, and which of their options to give on the command line.
Files are parsed as parse_statement() in criu/config.c and getopt_long() do.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from ovr.cli.criu_options import TABLES, Fate, Option, Table
from ovr.cli.output import one_line

__all__ = ["Unread", "unread_options", "words_of"]

_WORD: Final = re.compile(r'"((?:\\"|[^"])*)"|([^ \t\n]+)')
_MOST: Final = 20  # options shown
_LONGEST: Final = 256  # characters of each


class Unread(NamedTuple):
    """The options in the guest's configuration files, which are not read.

    Attributes:
        paths: paths of the files.
        give: options that the command line lacks, in its syntax.
        refused: options that ovr rejects.
        unknown: words that are not options of CRIU's.
        command: the command whose options these are: ``restore`` or ``dump``.
    """

    paths: tuple[str, ...]
    give: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    command: str = "restore"

    @property
    def fact(self) -> str:
        """The statement that the files are not read; one line."""
        return f"the guest's {' and '.join(self.paths)} {self._verb} not read"

    @property
    def cure(self) -> str:
        """The hint which options to give, may be empty; one line."""
        parts = []
        if self.give:
            wanted = _shown(map(_quoted, self.give))
            parts.append(f"if they are wanted, give ovr {self.command}: {wanted}")
        if self.refused:
            parts.append(f"ovr cannot honour {_shown(map(_quoted, self.refused))}")
        if self.unknown:
            unknown = _shown(map(_quoted, self.unknown))
            parts.append(f"not options of criu {self.command}: {unknown}")
        return "; ".join(parts)

    @property
    def _verb(self) -> str:
        return "is" if len(self.paths) == 1 else "are"


def unread_options(
    files: Mapping[str, str], given: Sequence[str] = (), command: str = "restore"
) -> Unread:
    """Return the options that the guest's configuration files would add to a command line.

    Args:
        files: their untrusted texts by path.
        given: the options for CRIU on the command line.
        command: ``restore`` or ``dump``.
    """
    known = dict(_names(TABLES[command]))
    there = {_positive(word.partition("=")[0]) for word in given}
    found: dict[Fate | None, dict[str, None]] = {fate: {} for fate in (*Fate, None)}
    for text in files.values():
        for word, option in _options(words_of(text), known):
            if option is None:
                found[None][word] = None
            elif option.fate is not Fate.PASSED or option.long not in there:
                found[option.fate][word] = None
    return Unread(
        tuple(map(one_line, files)), tuple(found[Fate.PASSED]), tuple(found[Fate.REFUSED]),
        tuple(found[None]), command,
    )  # fmt: skip


def words_of(text: str) -> Iterator[str]:
    """Yield the words of a configuration file as CRIU passes them to getopt."""
    for line in text.split("\n"):
        first = True
        for match in _WORD.finditer(line):
            quoted, plain = match.groups()
            if plain is not None and plain.startswith("#"):
                break
            word = plain if quoted is None else quoted.replace('\\"', '"')
            yield f"--{word}" if first else word
            first = False


def _options(
    words: Iterable[str], known: Mapping[str, Option]
) -> Iterator[tuple[str, Option | None]]:
    # Yields each option as one word, with its entry in the table. Other words are skipped, as by
    # getopt_long().
    rest = iter(words)
    for word in rest:
        if not word.startswith("-") or word in ("-", "--"):
            continue
        name, equals, value = word.partition("=")
        option, name = _find(name, known)
        if option is not None and option.value == "1" and not equals:
            equals, value = "=", next(rest, "")
        yield f"{name}{equals}{value}", option


def _find(name: str, known: Mapping[str, Option]) -> tuple[Option | None, str]:
    # By its name, or by an unambiguous prefix.
    if name in known:
        return known[name], name if name.startswith("--") else known[name].long
    begun = [full for full in known if name.startswith("--") and full.startswith(name)]
    return (known[begun[0]], begun[0]) if len(begun) == 1 else (None, name)


def _names(table: Table) -> Iterator[tuple[str, Option]]:
    for option in table:
        yield from ((name, option) for name in option.names)
        if option.value is None:
            # The opposite of a rejected option is the behaviour of ovr.
            fate = Fate.IGNORED if option.fate is Fate.REFUSED else option.fate
            yield f"--no-{option.long[2:]}", option._replace(fate=fate)


def _positive(name: str) -> str:
    return f"--{name[5:]}" if name.startswith("--no-") else name


def _quoted(word: str) -> str:
    return shlex.quote(one_line(word[:_LONGEST]))


def _shown(words: Iterable[str]) -> str:
    every = list(words)
    more = f" and {len(every) - _MOST} more" if len(every) > _MOST else ""
    return " ".join(every[:_MOST]) + more
