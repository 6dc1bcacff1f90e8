#!/bin/sh
# Restore a process tree from a directory written by "criu dump". The script was written for CRIU:
#
#     restore.sh IMAGES WORK                                 on this machine, with CRIU
#     CRIU=ovr OVR_VM=libvirt:web restore.sh IMAGES WORK     into a running VM, from outside
#
# Prints the pid and leaves log, pidfile and statistics in WORK.
set -eu

: "${CRIU:=criu}"
images=$1
work=$2

mkdir -p "$work"
rm -f "$work/pid"
if ! $CRIU restore -D "$images" -W "$work" -d --pidfile pid -o restore.log -v4 \
    --tcp-established --file-locks --manage-cgroups=soft >"$work/stdout"; then
    grep Error "$work/restore.log" | tail -n 3 >&2
    exit 1
fi
grep -q 'Restore finished successfully' "$work/restore.log"
cat "$work/pid"
