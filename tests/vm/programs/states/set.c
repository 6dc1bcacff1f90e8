/* Unusual values, different ones in each process and each thread. */
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "states.h"

#define TFD_IOC_SET_TICKS _IOW('T', 0, uint64_t)
#define SECBIT_NO_SETUID_FIXUP (1 << 2)
#define SECBIT_NOROOT (1 << 0)

int files[8], file_count;
int master, slave;

static void write_text(const char *path, const char *format, ...)
{
	char value[256];
	va_list list;
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	check(fd, path);
	va_start(list, format);
	vsnprintf(value, sizeof(value), format, list);
	va_end(list);
	check(write(fd, value, strlen(value)), path);
	close(fd);
}

void set_thread(struct thread *self)
{
	int odd = 1 + self->number + 11 * number;
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct caps[2];
	struct robust_list_head *robust;
	stack_t stack = {.ss_sp = self->stack + 64 * odd, .ss_size = 16384 + 64 * odd};
	uint64_t mask = 1ULL << (SIGUSR1 - 1) | 1ULL << (SIGUSR2 - 1) | 1ULL << (34 + odd);
	char name[16];

	snprintf(name, sizeof(name), "p%d-t%d \xff", number, self->number);
	check(prctl(PR_SET_NAME, name), "PR_SET_NAME");
	check(sigaltstack(&stack, NULL), "sigaltstack");
	/* The root's parent is the shell of the test, or CRIU: signals that are ignored anyway. */
	check(prctl(PR_SET_PDEATHSIG, odd % 2 ? SIGWINCH : SIGURG), "PR_SET_PDEATHSIG");
	robust = &self->robust[number % 8];
	robust->list.next = &robust->list;
	check(syscall(SYS_set_robust_list, robust, sizeof(*robust)), "robust list");
	syscall(SYS_set_tid_address, &self->tid_words[number % 8]);
	check(syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, 8), "sigprocmask");
	if (odd % 2)
		check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS");
	check(prctl(PR_CAPBSET_DROP, CAP_MAC_ADMIN - self->number), "PR_CAPBSET_DROP");
	check(syscall(SYS_capget, &header, caps), "capget");
	caps[0].inheritable = 1 << CAP_CHOWN | 1 << CAP_KILL;
	check(syscall(SYS_capset, &header, caps), "capset");
	check(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_KILL, 0, 0), "ambient");
	check(prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP | (odd % 2 ? SECBIT_NOROOT : 0)),
	      "PR_SET_SECUREBITS");
	caps[1].permitted &= ~(1 << (number % 4)); /* MAC_OVERRIDE … SYSLOG */
	caps[0].effective &= ~(1u << CAP_SYS_BOOT | 1u << (CAP_SYS_NICE + self->number));
	caps[1].effective &= caps[1].permitted;
	check(syscall(SYS_capset, &header, caps), "capset");
}

static void handler(int signal_number)
{
	(void)signal_number;
}

static void set_signals(void)
{
	struct sigaction action = {.sa_handler = handler};

	for (int n = 40; n < 60; n++) {
		sigemptyset(&action.sa_mask);
		sigaddset(&action.sa_mask, n - 5);
		sigaddset(&action.sa_mask, 35 + number);
		action.sa_flags = n % 2 ? SA_RESTART | SA_ONSTACK : SA_NODEFER | SA_SIGINFO;
		check(sigaction(n, &action, NULL), "sigaction");
	}
	signal(SIGHUP, SIG_IGN);
	signal(SIGTERM, handler);
}

static void set_limits(void)
{
	struct rlimit limit;

	for (int resource = RLIMIT_CPU + 1; resource < RLIM_NLIMITS; resource++) {
		limit.rlim_max = (1ULL << 40) + 100 * number + resource;
		if (resource == RLIMIT_NOFILE)
			limit.rlim_max = 300 + number;
		if (resource == RLIMIT_NICE)
			limit.rlim_max = 10 + number;
		if (resource == RLIMIT_RTPRIO)
			limit.rlim_max = 20 + number;
		limit.rlim_cur = limit.rlim_max - 5;
		check(setrlimit(resource, &limit), "setrlimit");
	}
}

void set_container(void)
{
	check(unshare(CLONE_NEWUTS | CLONE_NEWIPC), "unshare");
	check(sethostname("unusual-node", 12), "sethostname");
	check(setdomainname("unusual-domain", 14), "setdomainname");
	write_text("/proc/sys/kernel/sem", "251 32001 101 129");
	write_text("/proc/sys/kernel/msgmax", "8193");
	write_text("/proc/sys/kernel/msgmnb", "16385");
	write_text("/proc/sys/kernel/msgmni", "1001");
	write_text("/proc/sys/kernel/shmmax", "1000001");
	write_text("/proc/sys/kernel/shmall", "1000002");
	write_text("/proc/sys/kernel/shmmni", "1003");
	write_text("/proc/sys/kernel/shm_rmid_forced", "1");
	write_text("/proc/sys/fs/mqueue/queues_max", "257");
	write_text("/proc/sys/fs/mqueue/msg_max", "12");
	write_text("/proc/sys/fs/mqueue/msgsize_max", "8195");
	write_text("/proc/sys/fs/mqueue/msg_default", "11");
	write_text("/proc/sys/fs/mqueue/msgsize_default", "8194");
}

static void set_files(void)
{
	struct winsize size = {33 + number, 101, 7, 9};
	uint64_t ticks = 40 + number;
	char path[4096];
	sigset_t mask;
	int fd;

	snprintf(path, sizeof(path), "%s/data.%d", dir, number);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	check(fd, path);
	check(ftruncate(fd, 1 << 20), "ftruncate");
	check(lseek(fd, 4321 + number, SEEK_SET), "lseek");
	files[file_count++] = fd;
	files[file_count++] = fcntl(fd, F_DUPFD_CLOEXEC, 100 + number); /* one position for both */
	files[file_count++] = eventfd(77 + number, EFD_CLOEXEC);
	sigemptyset(&mask);
	sigaddset(&mask, 36 + number);
	files[file_count++] = signalfd(-1, &mask, number % 2 ? 0 : SFD_CLOEXEC);
	fd = files[file_count++] = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
	check(ioctl(fd, TFD_IOC_SET_TICKS, &ticks), "TFD_IOC_SET_TICKS");
	master = posix_openpt(O_RDWR | O_NOCTTY);
	check(master, "posix_openpt");
	check(grantpt(master) | unlockpt(master), "unlockpt");
	slave = open(ptsname(master), O_RDWR | O_NOCTTY);
	check(slave, "pty");
	check(ioctl(master, TIOCSWINSZ, &size), "TIOCSWINSZ");
}

void set_process(void)
{
	umask(0111 + number);
	check(personality(STICKY_TIMEOUTS | (number % 2 ? SHORT_INODE : WHOLE_SECONDS)),
	      "personality");
	check(prctl(PR_SET_CHILD_SUBREAPER, number % 2 == 0), "PR_SET_CHILD_SUBREAPER");
	write_text("/proc/self/oom_score_adj", "%d", 123 + number);
	write_text("/proc/self/loginuid", "%d", 1234 + number);
	check((long)sbrk(12345 + 4096 * number), "sbrk");
	set_signals();
	set_files();
	set_limits();
}
