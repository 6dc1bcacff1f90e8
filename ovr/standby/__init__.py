"""A process that stands by on the host: all of `ovr` is loaded there before a restore wants it.

To load Python and `ovr` takes longer than all else of a warm restore that is not copying. So
``ovr warm`` leaves a process that has done so (`server`), and ``ovr restore`` (`client`), which
loads a fraction, has it fork and do the work with the command's arguments, environment, directory
and open files (`child`). Where nobody stands by, or where the work could not be done there exactly
as here (`peer`), the command does it itself.

What the two say to each other, and where they meet, is in `messages`.
"""
