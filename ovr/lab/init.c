// PID 1 of a lab guest, in two halves.
//
// As /init of the initramfs: load the modules for the disk and the vsock device, mount the disk,
// copy the agent to it, make it the root; mount a separate disk of kernel modules, if the kernel's
// command line has "module_disk". Then, as the guest's init: mount the file systems of a Debian
// system, bring up the loopback device, keep the agent running, and reap every child (CRIU cannot
// create a process with the pid of a zombie). SIGTERM powers the machine off.
//
// The lab waits for READY on the console.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/perf_event.h>
#include <net/if.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define AGENT "/usr/local/sbin/ovr-agent"
#define DISK "/dev/vda"
#define READY "ovr-init: ready"

static void report(const char *what, const char *which)
{
	fprintf(stderr, "ovr-init: %s %s: %s\n", what, which, strerror(errno));
}

// The kernel panics when PID 1 exits, and QEMU exits with it.
static void need(bool done, const char *what, const char *which)
{
	if (done)
		return;
	report(what, which);
	exit(1);
}

static void rest(long milliseconds)
{
	struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};

	nanosleep(&time, NULL);
}

static void load_modules(const char *pattern)
{
	glob_t files;

	if (glob(pattern, 0, NULL, &files) != 0)
		return;
	for (size_t i = 0; i < files.gl_pathc; i++) {
		int fd = open(files.gl_pathv[i], O_RDONLY | O_CLOEXEC);

		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
			report("load", files.gl_pathv[i]);
		close(fd);
		unlink(files.gl_pathv[i]);
	}
	globfree(&files);
}

static void copy_program(const char *from, const char *to)
{
	struct stat info;
	int in = open(from, O_RDONLY | O_CLOEXEC);
	int out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);

	need(in >= 0 && fstat(in, &info) == 0, "read", from);
	need(out >= 0, "write", to);
	for (off_t left = info.st_size; left > 0;) {
		ssize_t sent = sendfile(out, in, NULL, left);

		need(sent > 0, "copy", from);
		left -= sent;
	}
	close(in);
	need(close(out) == 0, "write", to);
	unlink(from);
}

static void await_device(const char *path)
{
	for (int i = 0; i < 1000 && access(path, F_OK) != 0; i++)
		rest(10);
}

static void enter_disk(void)
{
	mkdir("/dev", 0755);
	mkdir("/disk", 0755);
	need(mount("dev", "/dev", "devtmpfs", 0, "") == 0 || errno == EBUSY, "mount", "/dev");
	load_modules("/modules/*.ko");
	await_device(DISK);
	need(mount(DISK, "/disk", "ext4", MS_NOATIME, "noinit_itable") == 0, "mount", DISK);
	copy_program("/ovr-agent", "/disk" AGENT);
	need(mount("/dev", "/disk/dev", NULL, MS_MOVE, NULL) == 0, "move", "/dev");
	need(chdir("/disk") == 0, "enter", "/disk");
	need(mount(".", "/", NULL, MS_MOVE, NULL) == 0, "move", "/disk");
	need(chroot(".") == 0 && chdir("/") == 0, "enter", "/");
}

// Modules for a kernel other than the disk's. Unknown kernel parameters become init's environment.
static void mount_modules(void)
{
	const char *disk = getenv("module_disk");

	if (!disk)
		return;
	await_device(disk);
	need(mount(disk, "/lib/modules", "ext4", MS_RDONLY | MS_NOATIME, "") == 0, "mount", disk);
}

static void mount_all(void)
{
	static const struct {
		const char *type, *path, *options;
		unsigned long flags;
	} mounts[] = {
		{"proc", "/proc", "", MS_NOSUID | MS_NODEV | MS_NOEXEC},
		{"sysfs", "/sys", "", MS_NOSUID | MS_NODEV | MS_NOEXEC},
		{"cgroup2", "/sys/fs/cgroup", "", MS_NOSUID | MS_NODEV | MS_NOEXEC},
		{"devpts", "/dev/pts", "mode=620,gid=5,ptmxmode=666", MS_NOSUID | MS_NOEXEC},
		{"tmpfs", "/dev/shm", "mode=1777", MS_NOSUID | MS_NODEV},
		{"tmpfs", "/run", "mode=755", MS_NOSUID | MS_NODEV},
		{"tmpfs", "/tmp", "mode=1777", MS_NOSUID | MS_NODEV},
	};

	for (size_t i = 0; i < sizeof(mounts) / sizeof(mounts[0]); i++) {
		mkdir(mounts[i].path, 0755);
		if (mount(mounts[i].type, mounts[i].path, mounts[i].type, mounts[i].flags,
			  mounts[i].options) != 0)
			report("mount", mounts[i].path);
	}
}

// Mount the host's directory, if the VM has one: a virtiofs device with the tag "share".
static void mount_share(void)
{
	mkdir("/mnt/share", 0755);
	if (mount("share", "/mnt/share", "virtiofs", MS_NOATIME, "") == 0)
		fprintf(stderr, "ovr-init: /mnt/share is a directory of the host\n");
}

static void loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) != 0)
		report("bring up", "lo");
	close(fd);
}

// CRIU sets hardware breakpoints. With the first and the last one in the system the kernel patches
// its scheduler (the static key perf_sched_events), and QEMU's TCG may run a half-patched
// instruction on another vCPU: the guest dies of an int3, after some hundreds of restores. An open
// event keeps the key enabled.
static void hold_perf_event(void)
{
	struct perf_event_attr event = {
		.type = PERF_TYPE_SOFTWARE,
		.size = sizeof(event),
		.config = PERF_COUNT_SW_DUMMY,
	};

	if (syscall(SYS_perf_event_open, &event, 0, -1, -1, PERF_FLAG_FD_CLOEXEC) < 0)
		report("open", "a perf event");
}

static void surroundings(void)
{
	static const char *const links[][2] = {
		{"/proc/self/fd", "/dev/fd"},
		{"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"},
		{"/proc/self/fd/2", "/dev/stderr"},
	};

	for (size_t i = 0; i < sizeof(links) / sizeof(links[0]); i++)
		if (symlink(links[i][0], links[i][1]) != 0 && errno != EEXIST)
			report("link", links[i][1]);
	clearenv();
	setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("HOME", "/root", 1);
	setenv("LANG", "C.UTF-8", 1);
}

static pid_t start_agent(void)
{
	static char *const argv[] = {AGENT, "--vsock-port", "687", "--serial", "org.ovr.0", NULL};
	pid_t pid = fork();

	if (pid != 0)
		return pid;
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	setsid();
	execv(AGENT, argv);
	report("start", AGENT);
	_exit(127);
}

// Reap all children; returns whether the agent was one of them.
static bool reap(pid_t agent)
{
	bool ended = false;
	pid_t child;
	int status;

	while ((child = waitpid(-1, &status, WNOHANG)) > 0) {
		if (child != agent)
			continue;
		fprintf(stderr, "ovr-init: the agent ended (status %#x)\n", status);
		ended = true;
	}
	return ended;
}

static void power_off(void)
{
	fprintf(stderr, "ovr-init: power off\n");
	kill(-1, SIGKILL);
	sync();
	reboot(RB_POWER_OFF);
}

int main(void)
{
	sigset_t signals;

	if (getpid() != 1) {
		fprintf(stderr, "ovr-init: must be PID 1 of a lab guest\n");
		return 2;
	}
	sigemptyset(&signals);
	sigaddset(&signals, SIGCHLD);
	sigaddset(&signals, SIGTERM);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	umask(0);
	enter_disk();
	mount_modules();
	mount_all();
	umask(022);
	mount_share();
	loopback_up();
	hold_perf_event();
	surroundings();
	fprintf(stderr, READY "\n");
	for (pid_t agent = 0;;) {
		const struct timespec second = {1, 0};

		if (agent <= 0)
			agent = start_agent();
		if (sigtimedwait(&signals, NULL, &second) == SIGTERM)
			power_off();
		if (reap(agent)) {
			rest(200);
			agent = 0;
		}
	}
}
