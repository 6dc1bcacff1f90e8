"""The lines of CRIU's log that are shown: the cause of a failure, and its cure.

The logs are CRIU's own: 4.1.1 in a guest of Debian trixie.
"""

import re

import pytest

from ovr.guest.client.criu_log import CAUSES, DUMP_CAUSES, KILLED, failure_in

END = (
    "(00.118103) Error (criu/cr-restore.c:2320): Restoring FAILED.",
    "(00.151801) Error (criu/cr-restore.c:1262): 164 killed by signal 9: Killed",
)
OPEN = "(00.117000)    164: Error (criu/files.c:1221): Unable to open fd=3 id=0x3"


def log(*lines, pid=164):
    return [f"(00.116000) {pid:>6}: Error ({line}" for line in lines] + [OPEN, *END]


SEEN = {
    "a file that is missing": (
        ["criu/files-reg.c:2353): Can't open file s/data on restore: No such file or directory",
         "criu/files-reg.c:2267): Can't open file s/data: No such file or directory"],
        "put /s/data into the guest", "s/data",
    ),
    "a FIFO that is missing": (
        ["criu/fifo.c:98): Can't open fake fifo 0x3 [s/ff]: No such file or directory",
         "criu/files-reg.c:2267): Can't open file s/ff: No such file or directory"],
        "put /s/ff into", "s/ff",
    ),
    "a mapped file that is missing": (
        ["criu/files-reg.c:2353): Can't open file s/a b on restore: No such file or directory",
         "criu/files-reg.c:2267): Can't open file s/a b: No such file or directory",
         "criu/mem.c:1424): `- Can't open vma"],
        "put /s/a b into", "s/a b",
    ),
    "a working directory that is missing": (
        ["criu/files-reg.c:2353): Can't open file s/cw on restore: No such file or directory",
         "criu/files-reg.c:2267): Can't open file s/cw: No such file or directory",
         "criu/files.c:1400): Can't open cwd"],
        "put /s/cw into", "s/cw",
    ),
    "a file of another size": (
        ["criu/files-reg.c:2175): File s/data has bad size 16 (expect 11)"],
        "had 11 bytes", "s/data",
    ),
    "an executable that was upgraded": (
        ["criu/files-reg.c:2153): File usr/bin/sleep has bad build-ID"],
        "another build", "usr/bin/sleep",
    ),
    "a port that is taken": (
        ["criu/sk-inet.c:1049): inet: Can't bind inet socket (id 3): Address already in use"],
        "end the process", None,
    ),
    "an address that is not there": (
        ["criu/sk-inet.c:1049): inet: Can't bind inet socket (id 3): Cannot assign requested"
         " address"],
        "the address that the socket", None,
    ),
    "TCP": (["criu/sk-inet.c:903): inet: Connected TCP socket in image"], "--tcp-close", None),
    "a lock": (["criu/file-lock.c:628): Can not set flock!"], "another process", None),
    "a server that is gone": (
        ["criu/sk-unix.c:2285): unix: FATAL: Peer 1855 unresolved for 700"], "--ext-unix-sk", None,
    ),
    "an external socket": (
        ["criu/sk-unix.c:1912): unix: External socket found in image. Consider using the"
         " --ext-unix-sk option to allow restoring it."],
        "--ext-unix-sk", None,
    ),
    "a directory of a socket": (
        ["criu/sk-unix.c:1651): unix: Can't bind id 0x3 ino 804 addr /s/dir/own.sock: No such file"
         " or directory"],
        "make the directory of /s/dir/own.sock", "s/dir/own.sock",
    ),
    "a terminal": (
        ["criu/tty.c:410): tty: Found slave peer index 0 without correspond master peer"],
        "a terminal of its own", None,
    ),
    "a mount": (["criu/mount.c:3130): mnt: No mapping for 12:/data mountpoint"],
                "--ext-mount-map /data:PATH", None),
    "a cgroup": (
        ["criu/cgroup.c:1249): cg: Can't move into unified//x/cgroup.procs (-1/9): No such file or"
         " directory"],
        "--manage-cgroups=ignore", None,
    ),
    "a feature of the CPU": (
        ["criu/arch/x86/cpu.c:223): cpu: CPU instruction capabilities do not match run time"],
        "CPU model", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "cure", "file"), SEEN.values(), ids=SEEN)
def test_known_causes(lines, cure, file):
    found = failure_in(log(*lines))
    assert cure in found.cure
    assert found.file == file
    assert "OOM" not in found.cure
    assert any(found.line.endswith(line) for line in lines)


DUMP_END = "Error (criu/cr-dump.c:2111): Dumping FAILED."
DUMP_FILES = "Error (criu/cr-dump.c:1681): Dump files (pid: 202) failed with -1"
NO_PROCESS = "Error (compel/src/lib/infect.c:418): Unable to detach from 3999: No such process"
SEEN_IN_DUMPS = {
    "no process": (
        ["Error (criu/tun.c:85): tun: Unable to create tun: No such file or directory", NO_PROCESS],
        NO_PROCESS, "debugger or strace",
    ),
    "no session leader": (
        ["Error (criu/pstree.c:300): The root process 191 is not a session leader. Consider using"
         " --shell-job option"],
        None, "--shell-job",
    ),
    "a terminal": (
        ["Error (criu/tty.c:1830): tty: Found dangling tty with sid 335 pgid 335 (pts) on peer fd"
         " 0."],
        None, "--shell-job",
    ),
    "TCP": (
        ["Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established"
         " option.", DUMP_FILES],
        None, "--tcp-established",
    ),
    "a lock": (
        ["Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try"
         " --file-locks to dump them."],
        None, "--file-locks",
    ),
    "a large deleted file": (
        ["Error (criu/files-reg.c:1031): Can't dump ghost file /tmp/ghost of 4194304 size, increase"
         " limit", DUMP_FILES],
        None, "/tmp/ghost is open and was deleted: give --ghost-limit 4194304",
    ),
    "a deleted name": (
        ["Error (criu/files-reg.c:1122): Can't create link remap for /tmp/link1. Use link-remap"
         " option.", DUMP_FILES],
        None, "/tmp/link1 is open and was deleted, and has another name: give --link-remap",
    ),
    "a Unix socket": (
        ["Error (criu/sk-unix.c:874): unix: External socket is used. Consider using --ext-unix-sk"
         " option."],
        None, "--ext-unix-sk",
    ),
    "a Unix stream": (
        ["Error (criu/sk-unix.c:881): unix: Can't dump half of stream unix connection. name:"
         " (null); peer name: /tmp/s"],
        None, "end the connection",
    ),
    "a nested pid namespace": (
        ["Error (criu/namespaces.c:460): Can't dump nested pid namespace for 323",
         "Error (criu/namespaces.c:700): Can't make pidns id"],
        None, "saves a pid namespace only if",
    ),
    "a chroot": (
        ["Error (criu/mount.c:3865): mnt: The root task has another root than mntns: /tmp/r",
         "Error (criu/cr-dump.c:1570): Collect mappings (pid: 349) failed with -1"],
        None, "chroot",
    ),
    "a file of another namespace": (
        ["Error (criu/files-reg.c:1790): Can't lookup mount=24 for fd=0 path=/dev/null",
         DUMP_FILES],
        None, "descriptor 0 (/dev/null)",
    ),
    "no iptables": (
        ['Error (criu/util.c:641): execvp("iptables-restore", ...) failed: No such file or'
         " directory",
         "Error (criu/util.c:656): exited, status=1",
         "Error (criu/net.c:3282): net: Locking network failed: iptables-restore returned -1. This"
         " may be connected to disabled CONFIG_NETFILTER_XT_MARK kernel build config option."],
        2, "apt-get install",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("lines", "line", "cure"), SEEN_IN_DUMPS.values(), ids=SEEN_IN_DUMPS)
def test_known_causes_of_failed_dumps(lines, line, cure):
    found = failure_in([*lines, DUMP_END])
    assert cure in found.cure
    assert found.file is None
    assert found.line == (lines[line] if isinstance(line, int) else line or lines[0])


@pytest.mark.parametrize(
    "path", ["opt/cgroup-tools/x", "usr/sbin/iptables", "{0}/{file.__class__}"]
)
def test_paths_are_no_causes(path):
    lines = [f"criu/files-reg.c:2267): Can't open file {path}: Text file busy"]
    assert failure_in(log(*lines)).cure == ""


def test_a_kill_that_came_first():
    found = failure_in([END[1], OPEN, END[0]])
    assert found.cure == KILLED
    assert "killed by signal 9" in found.line


def test_errors_of_other_programs_are_no_causes():
    """ip(8) and iptables write into CRIU's log, and CRIU goes on."""
    lines = [
        "Error: ipv4: Address already assigned.",
        "(00.2)      1: Error (criu/sk-inet.c:1049): inet: Can't bind inet socket (id 3): Bad file",
        *END,
    ]
    assert failure_in(lines).line == lines[1]


def test_an_unknown_cause_is_the_first_error_of_the_task_that_failed_last():
    lines = [
        "(00.1)      7: Error (criu/a.c:1): something that did no harm",
        "(00.2)      8: Error (criu/b.c:1): the cause",
        "(00.3)      8: Error (criu/b.c:2): a consequence",
        "(00.4) Error (criu/cr-restore.c:1258): 8 exited, status=1",
        *END,
    ]
    assert failure_in(lines) == (lines[1], "", None)


def test_the_restorer_has_a_prefix():
    lines = [
        "(00.2) pie: 20: Error (criu/pie/restorer.c:1): Can't create thread: Cannot allocate memory"
    ]
    found = failure_in([*lines, *END])
    assert found.line == lines[0]
    assert "free memory" in found.cure


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (["criu: unrecognized option '--x'"], 0),
        (["time=… level=warning msg=…", "Error: no such image"], 1),
        (["(00.4) Error (criu/cr-restore.c:1258): 8 exited, status=1"], 0),
    ],
)
def test_without_a_cause_in_the_log(lines, line):
    assert failure_in(lines) == (lines[line], "", None)


def test_every_cure_can_be_filled_in():
    for cause in (*CAUSES, *DUMP_CAUSES):
        groups = re.compile(cause.pattern).groupindex
        cause.cure.format(**dict.fromkeys(groups, "x"))
