/*
 * enter: make namespaces by hand, and run a program in them.
 *
 *     enter WORD… -- PROGRAM ARGUMENT…
 *
 * A word is a namespace: cgroup ipc mount net pid time user uts. Three
 * processes follow each other, whatever the words are: this one, which writes
 * the map of ids, one that makes the namespaces, and one that is in all of
 * them and becomes the program. The first two end.
 *
 * user: ids from 0 on are those from MAPPED on outside. mount: another root,
 * which is mounted at NEW_ROOT, with terminals, a tmpfs and (if there is a pid
 * namespace, too) a /proc of its own. net: the loopback is up.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/sched.h>
#include <net/if.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NEW_ROOT "/var/lib/ovr-pool/root"
#define MAPPED "100000"
#define SECONDS "86400" /* that the clocks of a time namespace are ahead */

static const struct {
	const char *name;
	int flag;
} words[] = {
	{"cgroup", CLONE_NEWCGROUP}, {"ipc", CLONE_NEWIPC}, {"mount", CLONE_NEWNS},
	{"net", CLONE_NEWNET},       {"pid", CLONE_NEWPID}, {"time", CLONE_NEWTIME},
	{"user", CLONE_NEWUSER},     {"uts", CLONE_NEWUTS},
};

static long check(long result, const char *what)
{
	if (result < 0) {
		fprintf(stderr, "enter: %s: %s\n", what, strerror(errno));
		exit(2);
	}
	return result;
}

static int flag_of(const char *word)
{
	for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++)
		if (!strcmp(words[i].name, word))
			return words[i].flag;
	fprintf(stderr, "enter: no namespace %s\n", word);
	exit(2);
}

static void write_text(const char *path, const char *text)
{
	int fd = check(open(path, O_WRONLY | O_CLOEXEC), path);

	check(write(fd, text, strlen(text)), path);
	close(fd);
}

/* Written from outside: who is in a new user namespace may map his own id only. */
static void map_ids(pid_t pid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/uid_map", pid);
	write_text(path, "0 " MAPPED " 65536\n");
	snprintf(path, sizeof(path), "/proc/%d/gid_map", pid);
	write_text(path, "0 " MAPPED " 65536\n");
}

static void become_root(void)
{
	check(setresgid(0, 0, 0), "setresgid");
	check(setgroups(0, NULL), "setgroups");
	check(setresuid(0, 0, 0), "setresuid");
	check(prctl(PR_SET_DUMPABLE, 1), "PR_SET_DUMPABLE"); /* else /proc/self is not ours */
}

static void bring_loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	int fd = check(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), "socket");

	check(ioctl(fd, SIOCSIFFLAGS, &request), "bring the loopback up");
	close(fd);
}

static void change_root(bool own_proc)
{
	check(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "make / private");
	/* One that is ours: what a user namespace finds mounted is locked. */
	check(mount(NEW_ROOT, NEW_ROOT, NULL, MS_BIND, NULL), "bind the new root");
	check(chdir(NEW_ROOT), NEW_ROOT);
	if (own_proc)
		check(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL),
		      "mount proc");
	check(mount("tmpfs", "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=1m"),
	      "mount a tmpfs");
	check(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
		    "ptmxmode=0666,mode=0620"),
	      "mount devpts");
	check(syscall(SYS_pivot_root, ".", "."), "pivot_root");
	check(umount2(".", MNT_DETACH), "leave the old root");
	check(chdir("/"), "chdir");
}

/* Files opened before are on mounts of another mount namespace. */
static void reopen_standard_descriptors(void)
{
	int null = check(open("/dev/null", O_RDWR), "/dev/null");

	for (int fd = 0; fd < 3; fd++)
		check(dup2(null, fd), "dup2");
	if (null > 2)
		close(null);
}

static void become(int flags, char **program)
{
	check(setsid(), "setsid");
	if (flags & CLONE_NEWUTS) {
		check(sethostname("in-here", 7), "sethostname");
		check(setdomainname("of-mine", 7), "setdomainname");
	}
	if (flags & CLONE_NEWNET)
		bring_loopback_up();
	if (flags & CLONE_NEWNS)
		change_root(flags & CLONE_NEWPID);
	reopen_standard_descriptors();
	execv(program[0], program);
	check(-1, program[0]);
}

static void make_namespaces(int flags, char **program, int go)
{
	char word;

	if (flags & CLONE_NEWUSER) {
		check(unshare(CLONE_NEWUSER), "unshare the user namespace");
		check(write(go, "", 1), "write");
		check(read(go, &word, 1) - 1, "the map of ids");
		become_root();
	}
	check(unshare(flags & ~CLONE_NEWUSER), "unshare");
	if (flags & CLONE_NEWTIME)
		write_text("/proc/self/timens_offsets",
			   "monotonic " SECONDS " 0\nboottime " SECONDS " 0\n");
	if (!check(fork(), "fork"))
		become(flags, program);
}

int main(int argc, char **argv)
{
	int flags = 0, next = 1, pair[2];
	pid_t pid;
	char word;

	while (next < argc && strcmp(argv[next], "--"))
		flags |= flag_of(argv[next++]);
	if (next + 1 >= argc) {
		fprintf(stderr, "usage: enter NAMESPACE... -- PROGRAM ARGUMENT...\n");
		return 2;
	}
	check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), "socketpair");
	pid = check(fork(), "fork");
	if (!pid) {
		close(pair[0]);
		make_namespaces(flags, argv + next + 1, pair[1]);
		return 0;
	}
	close(pair[1]);
	if (flags & CLONE_NEWUSER) {
		check(read(pair[0], &word, 1) - 1, "the user namespace");
		map_ids(pid);
		check(write(pair[0], "", 1), "write");
		check(read(pair[0], &word, 1), "wait"); /* until it has ended */
	}
	return 0;
}
