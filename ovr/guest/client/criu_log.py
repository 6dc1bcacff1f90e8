"""Find the cause of a failed restore or dump in CRIU's log, and a cure.

CRIU has no error codes, so the messages of versions 3.17 to 4.2 are matched, in the order of CRIU's
source files.
"""

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

__all__ = ["CAUSES", "DUMP_CAUSES", "FREE_MEMORY", "KILLED", "Cause", "Failure", "failure_in"]


class Cause(NamedTuple):
    """A known cause of failures.

    Attributes:
        pattern: matches the message; the group ``file`` is a path in the guest, without the first
            slash.
        cure: the hint, a format with the groups of the pattern.
        source: matches the source file in the message.
    """

    pattern: str
    cure: str
    source: str = ""


class Failure(NamedTuple):
    """The reason why CRIU failed.

    Attributes:
        line: the line of the log.
        cure: the hint, empty if the cause is unknown.
        file: the path of the file that differs from the dump, if that is the cause.
    """

    line: str
    cure: str = ""
    file: str | None = None


FREE_MEMORY: Final = "free memory in the guest, or raise the limit of the task's cgroup"
KILLED: Final = f"was it the OOM killer? See the guest's kernel log; {FREE_MEMORY}"

_FILE: Final = r"(?P<file>.+?)"
CAUSES: Final = (
    # criu/files-reg.c, also for executables and mapped files; fifo.c
    Cause(
        rf"Can't open (?:file|fake fifo \S+) \[?{_FILE}\]?(?: on restore)?: No such file",
        "put /{file} into the guest, as it was at the dump",
    ),
    Cause(
        rf"Can't open file {_FILE}(?: on restore)?: Permission denied",
        "may root open /{file} in the guest? Look at its file system, and at AppArmor or SELinux",
    ),
    Cause(
        rf"File {_FILE} has bad size (?P<is>\d+) \(expect (?P<was>\d+)\)",
        "at the dump /{file} had {was} bytes: put that version of it into the guest",
    ),
    Cause(
        rf"File {_FILE} has bad build-ID",
        "/{file} is another build than at the dump, as after an upgrade: install that version in"
        " the guest, or give --file-validation=filesize to compare sizes only",
    ),
    Cause(
        rf"File {_FILE} has bad mode \S+ \(expect (?P<was>\w+)\)",
        "chmod {was} /{file} in the guest, or give --skip-file-rwx-check",
    ),
    # criu/sk-inet.c
    Cause(
        "Connected TCP socket in image",
        "give --tcp-established, if the guest has the connection's address and the peer has not"
        " reset it, or --tcp-close",
    ),
    Cause(
        "Can't bind inet socket .*: Address already in use",
        "end the process of the guest that has this port",
    ),
    Cause(
        "Can't bind inet socket .*: Cannot assign requested address",
        "give the guest the address that the socket was bound to",
    ),
    # criu/file-lock.c
    Cause(
        "Can ?not set (?:flock|posix lock|ofd lock)|Can't set lease",
        "another process of the guest has locked the file: end it",
    ),
    # criu/sk-unix.c
    Cause(
        "External socket found in image|Peer \\d+ unresolved for",
        "the tree was connected to a Unix socket of another process: start that one in the guest,"
        " and give --ext-unix-sk",
    ),
    Cause(
        rf"Can't bind id .* addr /{_FILE}: No such file",
        "make the directory of /{file} in the guest",
    ),
    Cause("Can't connect \\d+ socket", "start the process that listens on that socket"),
    # criu/tty.c
    Cause(
        "Found slave peer index|Only one slave external peer|tty to inherit session"
        "|ctty inheritance detected",
        "the tree had the terminal of a shell or of ssh, which is not in the guest: dump one that"
        " has a terminal of its own (tmux, script), or none (setsid)",
    ),
    # criu/mount.c
    Cause(
        "Mount \\d+:\\S+ is autodetected external mount",
        "give --ext-mount-map auto",
    ),
    Cause(
        r"No mapping for \d+:(?P<mount>\S+) mountpoint",
        "give --ext-mount-map {mount}:PATH, with a path in the guest",
    ),
    Cause(
        rf"Can't (?:bind-mount|mount|re-mount) at /?{_FILE}: No such file",
        "the source of this mount, or the mountpoint, is not in the guest: make it",
    ),
    # criu/cgroup.c
    Cause(
        "",
        "give --manage-cgroups=ignore to leave the tree in the agent's cgroup, or make the cgroups",
        r"cgroup",
    ),
    # criu/arch/x86/cpu.c
    Cause(
        "CPU (?:instruction )?capabilities do not match|CPU xfeatures|CPU xsave|FPU feature",
        "give the VM the CPU model of the dump; --cpu-cap=none leaves out the comparison, and the"
        " tree dies when it uses a missing feature",
    ),
    # criu/net.c, criu/netfilter.c, criu/libnetlink.c
    Cause(
        "[Ii]ptables|IP tool failed|nft command error|Can't restore ip6?tables",
        "has the guest iproute2, iptables and nftables? apt-get install them",
        r"criu/(?:net|netfilter)\.c",
    ),
    # criu/cr-restore.c
    Cause(
        r"Can't fork for \d+: Resource temporarily unavailable",
        "the guest permits no more processes: see kernel.pid_max, and pids.max of the cgroup",
    ),
    Cause("Cannot allocate memory|Not enough memory|Out of memory", FREE_MEMORY),
    Cause("No space left on device", "free disk space or memory in the guest"),
)  # fmt: skip

_SHELL_JOB: Final = (
    "give --shell-job, if the restored tree is to have the terminal of the shell that runs criu"
    " restore; or start it with setsid, without a terminal"
)
DUMP_CAUSES: Final = (
    # compel/src/lib/infect.c
    Cause(
        r"Unable to detach from (?P<pid>\d+): No such process",
        "has process {pid} ended, or does another program trace it, such as a debugger or strace?"
        " It must not be one of the kernel's",
    ),
    Cause(
        "criu itself is within dumped tree",
        "ovr-agent and init of the guest cannot be dumped: name the root of another tree",
    ),
    # criu/pstree.c, tty.c, cr-dump.c
    Cause(
        r"is not a session leader|Found dangling tty|session leader of .* is outside of its pid",
        _SHELL_JOB,
    ),
    # criu/sk-inet.c
    Cause(
        "Connected TCP socket, consider using",
        "give --tcp-established to save its connections, or --tcp-close to have them closed",
    ),
    Cause("In-flight connection", "give --skip-in-flight to leave out connections being made"),
    # criu/file-lock.c
    Cause("Some file locks are hold by dumping tasks", "give --file-locks"),
    # criu/files-reg.c
    Cause(
        r"Can't dump ghost file (?P<path>.+) of (?P<size>\d+) size",
        "{path} is open and was deleted: give --ghost-limit {size} or more to save its content",
    ),
    Cause(
        r"Can't create link remap for (?P<path>.+)\. Use link-remap",
        "{path} is open and was deleted, and has another name: give --link-remap",
    ),
    Cause(
        r"Can't lookup mount=\d+ for fd=(?P<fd>\d+) path=(?P<path>\S+)",
        "descriptor {fd} ({path}) was opened in another mount namespace: close it in the tree, or"
        " name it with --external 'file[…]'",
    ),
    # criu/sk-unix.c
    Cause(
        "External socket is used",
        "the tree is connected to a Unix socket of another process: give --ext-unix-sk, which is"
        " for datagram sockets; a stream must be closed",
    ),
    Cause(
        "Can't dump half of stream unix connection|Can't dump name-less external socket",
        "the tree is connected to a Unix socket of another process, which cannot be saved: dump"
        " that process as well, in one tree, or end the connection",
    ),
    # criu/namespaces.c
    Cause(
        r"Can't dump nested (?P<kind>\w+) namespace for \d+",
        "CRIU saves a {kind} namespace only if the root of the tree is in it: dump the tree of"
        " the process that is its root",
    ),
    Cause(
        "Can't dump a pid namespace without the process init",
        "name the process that has pid 1 in that namespace",
    ),
    # criu/mount.c
    Cause(
        "The root task has another root than mntns",
        "the tree runs in a chroot inside a mount namespace: dump the tree that has made the"
        " namespace, or use pivot_root",
    ),
    Cause(
        r"\d+:(?P<mount>\S+) doesn't have a proper root mount",
        "a part of another file system is mounted at {mount}: give --external 'mnt[{mount}]:NAME',"
        " and at the restore --external 'mnt[NAME]:PATH'",
    ),
    Cause("has unreachable sharing", "give --enable-external-masters"),
    # criu/files-ext.c
    Cause(
        r"Can't dump file \d+ of that type \[\d+\] \((?P<what>.*)\)",
        "CRIU cannot save such a descriptor ({what}): close it in the tree",
    ),
    # criu/net.c
    Cause(
        "Locking network failed|ip6?tables-restore|nft: command failed",
        "has the guest iptables, or nftables? apt-get install them, or give --network-lock skip if"
        " nothing uses the network meanwhile",
    ),
)  # fmt: skip

_ERROR: Final = re.compile(r"(?:(?P<pid>\d+): )?Error \((?P<source>[^():\s]+):\d+\): (?P<text>.*)")
_FAILED: Final = ("Restoring FAILED", "Dumping FAILED")
# sigchld_handler() in criu/cr-restore.c.
_TASK_KILLED: Final = re.compile(r"\d+ killed by signal 9\b")
# Errors of the callers of the function that failed.
_CONSEQUENCE: Final = re.compile(
    r"\d+ (?:exited, status|killed by signal|stopped by signal)|exited, status="
    r"|Unable to open fd=|`- Can't open vma|Can't open (?:cwd|root)$|Child \d+ died"
    r"|(?:Dump|Collect) .* \(pid: \d+\) failed with|Can't make \w+ id$"
    # A search for features of the kernel, without which CRIU goes on.
    r"|Unable to create tun"
)


class _Error(NamedTuple):
    line: str
    pid: str | None
    source: str
    text: str


def failure_in(log: Sequence[str]) -> Failure:
    """Return the reason why CRIU failed.

    A known cause takes precedence, else the first error of the task that failed last. Errors about
    ended child processes, and all errors after "Restoring FAILED" and "Dumping FAILED", are
    consequences.

    Args:
        log: lines of CRIU's log, then those of an engine; at least one.
    """
    errors = _errors(log)
    if errors and _TASK_KILLED.search(errors[0].text):
        return Failure(errors[0].line, KILLED)
    causes = [error for error in errors if not _CONSEQUENCE.search(error.text)]
    for error in reversed(causes):
        for cause in (*CAUSES, *DUMP_CAUSES):
            found = re.search(cause.pattern, error.text)
            if found and re.search(cause.source, error.source):
                groups = found.groupdict()
                return Failure(error.line, cause.cure.format(**groups), groups.get("file"))
    if causes:
        of_task = [error for error in causes if error.pid == causes[-1].pid]
        return Failure(of_task[0].line)
    return Failure(errors[0].line if errors else _error_of_a_program(log))


def _errors(log: Sequence[str]) -> list[_Error]:
    found = []
    for line in log:
        match = _ERROR.search(line)
        if match and match["text"].startswith(_FAILED):
            break
        if match:
            found.append(_Error(line, match["pid"], match["source"], match["text"]))
    return found


def _error_of_a_program(log: Sequence[str]) -> str:
    # Without a log of CRIU, it rejected its options, or an engine failed before it.
    return next((line for line in log if "rror" in line), log[0])
