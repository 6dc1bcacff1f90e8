"""Files that `ovr` writes: opened so that no other user decides which file that is.

`locate` finds the directory of a path that the user has named, `Directory.private` opens one of
this user's own (a cache, a runtime directory). In both a file is made, overwritten or replaced by
descriptor, and never through a link that another user has made (`trust`). `cure_of` says what to do
where none can be made.
"""

from ovr.host.cures import cure_of
from ovr.host.directory import Directory, Replacement, locate
from ovr.host.trust import UntrustedPath

__all__ = ["Directory", "Replacement", "UntrustedPath", "cure_of", "locate"]
