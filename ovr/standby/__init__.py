"""The standby process on the host, which has all of `ovr` loaded before the next restore.

In a warm restore, loading Python and `ovr` takes longer than everything else but copying. So
``ovr warm`` leaves a process that has loaded them (`server`). ``ovr restore`` (`client`) loads only
a fraction, and asks it to fork a child that does the work with the command's arguments,
environment, directory and open files (`child`). Without a standby process, or if the child could
not do the work exactly as the command would (`peer`), the command does it itself.

They connect at a socket in a directory of the user's own (`place`). Before sending more than random
bytes, each identifies the process at the other end (`proof`) and checks that it has the same rights
(`peer`). `messages` has the protocol, `visit` the server's side of a connection.
"""
