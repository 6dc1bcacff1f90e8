"""A process that stands by on the host: all of `ovr` is loaded there before a restore wants it.

To load Python and `ovr` takes longer than all else of a warm restore that is not copying. So
``ovr warm`` leaves a process that has done so (`server`), and ``ovr restore`` (`client`), which
loads a fraction, has it fork and do the work with the command's arguments, environment, directory
and open files (`child`). Where nobody stands by, or where the work could not be done there exactly
as here (`peer`), the command does it itself.

They meet at a socket in a directory of the user's own (`place`). Before either says more than
random bytes, both make sure which process the other is (`proof`), and that it has the same rights
(`peer`). What they say is in `messages`; the server's side of it is a `visit`.
"""
