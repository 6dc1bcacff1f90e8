#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm; mount -t devpts pts /dev/pts
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp; mount -t cgroup2 cg /sys/fs/cgroup
mount -o remount,rw /; ip link set lo up; ulimit -c 0
mkdir -p /img; mount -t tmpfs img /img
criu --version; uname -r
dump() { # name, mode, extra...
  name=$1 mode=$2; shift 2
  mkdir -p /img/$name
  echo $base > /proc/sys/kernel/ns_last_pid
  setsid $pre /root/sample $mode </dev/null >/root/$name.out 2>&1 &
  pid=$!; i=0
  while [ $i -lt 50 ]; do grep -q ready /root/$name.out && break; sleep 0.2; i=$((i+1)); done
  P=$(pgrep -o -x sample); echo "$name: shell $pid, sample $P"
  for f in maps status; do cat /proc/$P/$f > /img/$name/proc.$f; done
  if [ "$name" = parent ]; then
    mkdir -p /img/$name/first
    criu pre-dump -t $P -D /img/$name/first --track-mem -v4 -o dump.log; echo "pre-dump rc $?"
    sleep 1
    criu dump -t $P -D /img/$name -v4 -o dump.log --track-mem --prev-images-dir first --leave-running "$@"; echo "$name dump rc $?"
  else
    criu dump -t $P -D /img/$name -v4 -o dump.log --leave-running "$@"; echo "$name dump rc $?"
  fi
  grep Error /img/$name/dump.log
  pkill -9 -x sample; sleep 0.5
}
base=1000; dump one one
base=2000; dump tree tree
base=3000; dump parent churn
base=4000; pre="unshare -u -i" dump uts one
if command -v crit >/dev/null; then
  mkdir -p /img/crit; for f in /img/one/*.img /img/tree/*.img; do case $f in */pages-*|*tmpfs*) ;; *) crit decode -i $f -o /img/crit/$(basename $(dirname $f))-$(basename $f .img).json;; esac; done
fi
ls -lR /img
tar cf /dev/vdb -C /img .
sync; mount -o remount,ro /; echo DONE; echo o > /proc/sysrq-trigger; sleep 10
