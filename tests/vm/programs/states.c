/*
 * states: a process (or a tree) with unusual values for every kind of state that ovr restores.
 *
 *     states DIR PROCESSES
 *
 * PROCESSES processes (each the child of the one before), THREADS threads each, every one with
 * values of its own. Each process writes DIR/pid.N when it is ready. On SIGUSR1 to a process it
 * asks the kernel for everything anew, each thread for itself, and writes one JSON object to
 * DIR/answer.N: the keys are ovr's names of the kinds; `threads` has an object for each thread.
 *
 * No malloc after the start: a heap that is not restored must be seen, not crash us.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/futex.h>
#include <linux/prctl.h>
#include <pthread.h>
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
#include <time.h>
#include <unistd.h>

#define THREADS 3
#define SIGNALS 64
#define TFD_IOC_SET_TICKS _IOW('T', 0, uint64_t)
#define SECBIT_NO_SETUID_FIXUP (1 << 2)
#define SECBIT_NOROOT (1 << 0)

struct thread {
	int number;
	volatile int turn; /* main adds one to ask, the thread answers with `done` */
	volatile int done;
	volatile pid_t tid;
	struct robust_list_head robust[8]; /* one of them is used: addresses of its own */
	int tid_words[8];
	char stack[32768];
	char text[4096];
};

static const char *dir;
static int number; /* of this process */
static struct thread threads[THREADS];
static char text[65536];
static size_t used;
static int files[8], file_count;
static int master, slave;

static void die(const char *what)
{
	dprintf(2, "states: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static void check(long result, const char *what)
{
	if (result < 0)
		die(what);
}

/* --- setting unusual values --- */

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

static void set_thread(struct thread *self)
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
	check(prctl(PR_SET_SECUREBITS,
		    SECBIT_NO_SETUID_FIXUP | (odd % 2 ? SECBIT_NOROOT : 0)),
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

static void set_container(void)
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

static void set_process(void)
{
	umask(0111 + number);
	check(personality(STICKY_TIMEOUTS | (number % 2 ? SHORT_INODE : WHOLE_SECONDS)), "personality");
	check(prctl(PR_SET_CHILD_SUBREAPER, number % 2 == 0), "PR_SET_CHILD_SUBREAPER");
	write_text("/proc/self/oom_score_adj", "%d", 123 + number);
	write_text("/proc/self/loginuid", "%d", 1234 + number);
	check((long)sbrk(12345 + 4096 * number), "sbrk");
	set_signals();
	set_files();
	set_limits();
}

/* --- asking the kernel --- */

static size_t add(char *to, size_t at, size_t size, const char *format, ...)
{
	va_list list;
	int length;

	va_start(list, format);
	length = vsnprintf(to + at, size - at, format, list);
	va_end(list);
	if (length < 0 || at + length >= size)
		die("answer too long");
	return at + length;
}

#define ADD(...) (used = add(text, used, sizeof(text), __VA_ARGS__))

static size_t read_all(const char *path, unsigned char *to, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t at = 0;
	ssize_t got;

	check(fd, path);
	while ((got = read(fd, to + at, size - 1 - at)) > 0)
		at += got;
	check(got, path);
	close(fd);
	to[at] = 0;
	return at;
}

/* What follows `key` in a file of lines, up to the end of the line. */
static const char *line_of(const char *path, const char *key)
{
	static __thread unsigned char content[8192];
	char *start;

	read_all(path, content, sizeof(content));
	start = strstr((char *)content, key);
	if (!start)
		return "";
	start += strlen(key);
	start += strspn(start, " \t");
	start[strcspn(start, "\n")] = 0;
	return start;
}

static void add_file(const char *path)
{
	static unsigned char content[16384];
	size_t length = read_all(path, content, sizeof(content));

	ADD("\"");
	for (size_t i = 0; i < length; i++)
		ADD("%02x", content[i]);
	ADD("\"");
}

static void ask_thread(struct thread *self)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct caps[2];
	unsigned char name[32];
	char path[64];
	void *robust = NULL, *word = NULL;
	size_t at = 0, size = sizeof(self->text), length;
	uint64_t mask = 0, bset = 0, ambient = 0;
	int pdeath = -1;
	stack_t stack;

	snprintf(path, sizeof(path), "/proc/self/task/%d/comm", self->tid);
	length = read_all(path, name, sizeof(name));
	at = add(self->text, at, size, "{\"comm\": \"");
	for (size_t i = 0; i < length; i++)
		at = add(self->text, at, size, "%02x", name[i]);
	snprintf(path, sizeof(path), "/proc/self/task/%d/personality", self->tid);
	at = add(self->text, at, size, "\", \"personality\": \"%s\"", line_of(path, ""));
	snprintf(path, sizeof(path), "/proc/self/task/%d/loginuid", self->tid);
	at = add(self->text, at, size, ", \"loginuid\": \"%s\"", line_of(path, ""));
	syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, 8);
	at = add(self->text, at, size, ", \"blocked_signals\": %llu", (unsigned long long)mask);
	sigaltstack(NULL, &stack);
	at = add(self->text, at, size, ", \"alternate_signal_stack\": [%lu, %lu, %d]",
		 (unsigned long)stack.ss_sp, stack.ss_size, stack.ss_flags);
	prctl(PR_GET_PDEATHSIG, &pdeath);
	at = add(self->text, at, size, ", \"pdeath_signal\": %d", pdeath);
	syscall(SYS_get_robust_list, 0, &robust, &length);
	at = add(self->text, at, size, ", \"robust_list\": %lu", (unsigned long)robust);
	prctl(PR_GET_TID_ADDRESS, &word);
	at = add(self->text, at, size, ", \"clear_child_tid\": %lu", (unsigned long)word);
	at = add(self->text, at, size, ", \"no_new_privs\": %d", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
	at = add(self->text, at, size, ", \"securebits\": %d", prctl(PR_GET_SECUREBITS));
	syscall(SYS_capget, &header, caps);
	for (int i = 0; i <= CAP_LAST_CAP; i++) {
		bset |= (uint64_t)(prctl(PR_CAPBSET_READ, i) == 1) << i;
		ambient |= (uint64_t)(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, i, 0, 0) == 1) << i;
	}
	at = add(self->text, at, size, ", \"capabilities\": [");
	for (int i = 0; i < 2; i++)
		at = add(self->text, at, size, "%u, %u, %u, ", caps[i].inheritable,
			 caps[i].permitted, caps[i].effective);
	add(self->text, at, size, "%llu, %llu]}", (unsigned long long)bset,
	    (unsigned long long)ambient);
}

static void ask_signals(void)
{
	struct { uint64_t handler, flags, restorer, mask; } action;

	ADD("\"signal_actions\": [");
	for (int n = 1; n <= SIGNALS; n++) {
		check(syscall(SYS_rt_sigaction, n, NULL, &action, 8), "sigaction");
		ADD("%s[%llu, %llu, %llu, %llu]", n > 1 ? ", " : "",
		    (unsigned long long)action.handler, (unsigned long long)action.flags,
		    (unsigned long long)action.restorer, (unsigned long long)action.mask);
	}
	ADD("], ");
}

static void ask_files(void)
{
	struct winsize one, two;
	char path[64];

	ADD("\"file_position\": [%ld, %ld], ", (long)lseek(files[0], 0, SEEK_CUR),
	    (long)lseek(files[1], 0, SEEK_CUR));
	ADD("\"close_on_exec\": [");
	for (int i = 0; i < file_count; i++)
		ADD("%s%d", i ? ", " : "", fcntl(files[i], F_GETFD));
	ADD("], ");
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", files[2]);
	ADD("\"eventfd_counter\": \"%s\", ", line_of(path, "eventfd-count:"));
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", files[3]);
	ADD("\"signalfd_mask\": \"%s\", ", line_of(path, "sigmask:"));
	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", files[4]);
	ADD("\"timerfd_ticks\": \"%s\", ", line_of(path, "ticks:"));
	check(ioctl(master, TIOCGWINSZ, &one), "TIOCGWINSZ");
	check(ioctl(slave, TIOCGWINSZ, &two), "TIOCGWINSZ");
	ADD("\"window_size\": [%d, %d, %d, %d, %d, %d, %d, %d], ", one.ws_row, one.ws_col,
	    one.ws_xpixel, one.ws_ypixel, two.ws_row, two.ws_col, two.ws_xpixel, two.ws_ypixel);
}

static void ask_mm(void)
{
	static unsigned char stat[4096];
	unsigned long field[53] = {0};
	char *at;

	read_all("/proc/self/stat", stat, sizeof(stat));
	at = strrchr((char *)stat, ')') + 2;
	for (int i = 3; i <= 52 && at; i++) {
		field[i] = strtoul(at, NULL, 10);
		at = strchr(at, ' ');
		at = at ? at + 1 : NULL;
	}
	ADD("\"code_bounds\": [%lu, %lu, %lu, %lu, %lu], ", field[26], field[27], field[45],
	    field[46], field[28]);
	ADD("\"arguments\": [%lu, %lu, %lu, %lu, ", field[48], field[49], field[50], field[51]);
	add_file("/proc/self/cmdline");
	ADD("], \"auxv\": ");
	add_file("/proc/self/auxv");
	ADD(", \"brk\": [%lu, %lu], ", field[47], (unsigned long)syscall(SYS_brk, 0));
	ADD("\"dumpable\": %d, ", prctl(PR_GET_DUMPABLE));
}

static void ask_limits(void)
{
	struct rlimit limit;

	ADD("\"rlimits\": [");
	for (int resource = RLIMIT_CPU + 1; resource < RLIM_NLIMITS; resource++) {
		check(getrlimit(resource, &limit), "getrlimit");
		ADD("%s%llu, %llu", resource > 1 ? ", " : "", (unsigned long long)limit.rlim_cur,
		    (unsigned long long)limit.rlim_max);
	}
	ADD("], ");
}

static void ask_container(void)
{
	static const char *const names[] = {
		"kernel/sem", "kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/shmmax",
		"kernel/shmall", "kernel/shmmni", "kernel/shm_rmid_forced", "fs/mqueue/queues_max",
		"fs/mqueue/msg_max", "fs/mqueue/msgsize_max", "fs/mqueue/msg_default",
		"fs/mqueue/msgsize_default",
	};
	char path[64];

	ADD("\"nodename\": \"%s\", ", line_of("/proc/sys/kernel/hostname", ""));
	ADD("\"domainname\": \"%s\", ", line_of("/proc/sys/kernel/domainname", ""));
	ADD("\"ipc_limits\": \"");
	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
		snprintf(path, sizeof(path), "/proc/sys/%s", names[i]);
		for (const char *c = line_of(path, ""); *c; c++)
			ADD("%c", *c == '\t' ? ' ' : *c);
		ADD("; ");
	}
	ADD("\", ");
}

static void ask_process(void)
{
	mode_t mask = umask(0);
	int subreaper = -1;

	umask(mask);
	used = 0;
	ADD("{\"umask\": %d, ", (int)mask);
	ADD("\"oom_score_adj\": \"%s\", ", line_of("/proc/self/oom_score_adj", ""));
	prctl(PR_GET_CHILD_SUBREAPER, &subreaper);
	ADD("\"child_subreaper\": %d, ", subreaper);
	ask_signals();
	ask_files();
	ask_mm();
	ask_limits();
	ask_container();
	ADD("\"threads\": [");
	for (int i = 0; i < THREADS; i++) {
		if (i) {
			threads[i].turn++;
			syscall(SYS_futex, &threads[i].turn, FUTEX_WAKE, 1, NULL, NULL, 0);
			while (threads[i].done != threads[i].turn)
				usleep(1000);
		} else {
			ask_thread(&threads[0]);
		}
		ADD("%s%s", i ? ", " : "", threads[i].text);
	}
	ADD("]}\n");
}

static void publish(const char *what)
{
	char path[4096], partial[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/%s.%d", dir, what, number);
	snprintf(partial, sizeof(partial), "%s/.%s.%d", dir, what, number);
	fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	check(fd, partial);
	if (write(fd, text, used) != (ssize_t)used || close(fd) || rename(partial, path))
		die(path);
}

/* --- the processes and their threads --- */

static void *run_thread(void *argument)
{
	struct thread *self = argument;

	self->tid = syscall(SYS_gettid);
	set_thread(self);
	self->done = self->turn = 1;
	for (;;) {
		while (self->turn == self->done)
			syscall(SYS_futex, &self->turn, FUTEX_WAIT, self->done, NULL, NULL, 0);
		ask_thread(self);
		self->done = self->turn;
	}
	return NULL;
}

static void start_child(char **argv, int processes)
{
	char name[16];
	pid_t child;

	if (number + 1 >= processes)
		return;
	child = fork();
	check(child, "fork");
	if (child)
		return;
	/* A new image: addresses of its own, too. */
	snprintf(name, sizeof(name), "%d", number + 1);
	argv[3] = name;
	execv("/proc/self/exe", argv);
	die("exec");
}

static void start_threads(void)
{
	pthread_t id;

	for (int i = 0; i < THREADS; i++)
		threads[i].number = i;
	for (int i = 1; i < THREADS; i++)
		if (pthread_create(&id, NULL, run_thread, &threads[i]))
			die("pthread_create");
	for (int i = 1; i < THREADS; i++)
		while (!threads[i].done)
			usleep(1000);
	threads[0].tid = getpid();
	set_thread(&threads[0]);
}

int main(int argc, char **argv)
{
	char *arguments[5] = {argv[0]};
	sigset_t wanted;
	int got, null;

	if (argc < 3 || argc > 4) {
		dprintf(2, "usage: states DIR PROCESSES\n");
		return 2;
	}
	memcpy(arguments, argv, argc * sizeof(*argv));
	dir = argv[1];
	number = argc == 4 ? atoi(argv[3]) : 0;
	null = open("/dev/null", O_RDWR);
	check(null, "/dev/null");
	if (number == 0) {
		setsid();
		for (int fd = 0; fd < 2; fd++)
			dup2(null, fd);
		set_container();
	}
	start_child(arguments, atoi(argv[2]));
	set_process();
	start_threads();
	check(prctl(PR_SET_DUMPABLE, number % 2 == 0), "PR_SET_DUMPABLE");
	dup2(null, 2);
	used = 0;
	ADD("%d\n", getpid());
	publish("pid");
	sigemptyset(&wanted);
	sigaddset(&wanted, SIGUSR1);
	for (;;)
		if (!sigwait(&wanted, &got)) {
			ask_process();
			publish("answer");
		}
}
