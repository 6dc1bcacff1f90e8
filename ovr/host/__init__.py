"""Files that `ovr` writes, opened so that no other user decides which file is written.

`locate` finds the directory of a path given by the user, `Directory.private` opens a directory of
this user's own (a cache, a runtime directory). In both, files are made, overwritten or replaced by
descriptor, and never through a link made by another user (`trust`). `cure_of` returns the hint for
files that cannot be made.
"""

from ovr.host.cures import cure_of
from ovr.host.directory import Directory, Replacement, locate
from ovr.host.trust import UntrustedPath

__all__ = ["Directory", "Replacement", "UntrustedPath", "cure_of", "locate"]
