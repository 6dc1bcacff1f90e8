/* All values as the kernel has them, as JSON: read anew each time. */
#include <fcntl.h>
#include <linux/capability.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "states.h"

#define SIGNALS 64

static char text[65536];
static size_t used;

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

/* The rest of the line that begins with `key`. */
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

void ask_thread(struct thread *self)
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
	at = add(self->text, at, size, ", \"no_new_privs\": %d",
		 prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
	at = add(self->text, at, size, ", \"securebits\": %d", prctl(PR_GET_SECUREBITS));
	syscall(SYS_capget, &header, caps);
	for (int i = 0; i <= CAP_LAST_CAP; i++) {
		bset |= (uint64_t)(prctl(PR_CAPBSET_READ, i) == 1) << i;
		ambient |= (uint64_t)(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, i, 0, 0) == 1)
			   << i;
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
	struct {
		uint64_t handler, flags, restorer, mask;
	} action;

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
		"kernel/sem",
		"kernel/msgmax",
		"kernel/msgmnb",
		"kernel/msgmni",
		"kernel/shmmax",
		"kernel/shmall",
		"kernel/shmmni",
		"kernel/shm_rmid_forced",
		"fs/mqueue/queues_max",
		"fs/mqueue/msg_max",
		"fs/mqueue/msgsize_max",
		"fs/mqueue/msg_default",
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

void answer(void)
{
	ask_process();
	publish("answer");
}

void tell_pid(void)
{
	used = 0;
	ADD("%d\n", getpid());
	publish("pid");
}
