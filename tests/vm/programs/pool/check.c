/* The protocol and the findings of the pool's programs; see check.h. */
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define NOTES 20
#define NOTE 112

struct findings {
	unsigned long checks;
	unsigned wrong;
	char notes[NOTES][NOTE];
	unsigned target_size;
	char targets[8192]; /* only while setting up */
};

struct request {
	unsigned round, phase;
};

const char *directory;
struct child children[CHILDREN];
int child_count;

static struct findings found, theirs;
static bool remembering;
static char **words;

void __attribute__((weak)) prepare(void) {}

bool has_argument(const char *word)
{
	for (char **one = words; *one; one++)
		if (!strcmp(*one, word))
			return true;
	return false;
}

/* --- findings --- */

static void file_path(char *path, const char *prefix, const char *name)
{
	if (snprintf(path, PATH_MAX, "%s/%s%s", directory, prefix, name) >= PATH_MAX)
		_exit(2);
}

void publish(const char *name, const char *text, size_t size)
{
	char path[PATH_MAX], partial[PATH_MAX];
	int fd;

	file_path(path, "", name);
	file_path(partial, ".", name);
	fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || write(fd, text, size) != (ssize_t)size || close(fd) || rename(partial, path))
		_exit(2);
}

void die(const char *what)
{
	char text[256];
	int size = snprintf(text, sizeof(text), "%s: %s\n", what, strerror(errno));

	dprintf(2, "%s", text);
	if (directory)
		publish("died", text, size);
	_exit(2);
}

long check(long result, const char *what)
{
	if (result < 0)
		die(what);
	return result;
}

bool expect(bool right, const char *format, ...)
{
	unsigned number;
	va_list list;

	__atomic_fetch_add(&found.checks, 1, __ATOMIC_RELAXED);
	if (right)
		return true;
	number = __atomic_fetch_add(&found.wrong, 1, __ATOMIC_RELAXED);
	if (number < NOTES) {
		va_start(list, format);
		vsnprintf(found.notes[number], NOTE, format, list);
		va_end(list);
	}
	return false;
}

bool all_right(void)
{
	return __atomic_load_n(&found.wrong, __ATOMIC_RELAXED) == 0;
}

static void take_over(const struct findings *other)
{
	found.checks += other->checks;
	for (unsigned i = 0; i < other->wrong && i < NOTES; i++)
		if (found.wrong + i < NOTES)
			memcpy(found.notes[found.wrong + i], other->notes[i], NOTE);
	found.wrong += other->wrong;
	if (found.target_size + other->target_size <= sizeof(found.targets)) {
		memcpy(found.targets + found.target_size, other->targets, other->target_size);
		found.target_size += other->target_size;
	}
}

void remember_findings(void)
{
	remembering = true;
}

static void begin_findings(void)
{
	found.checks = 0;
	found.target_size = 0;
	if (!remembering)
		found.wrong = 0;
}

static void add_target(const void *address, const char *mark, const char *what)
{
	char line[128];
	int size = snprintf(line, sizeof(line), "%d %p %s%s\n", getpid(), address, mark, what);

	if (found.target_size + size <= sizeof(found.targets)) {
		memcpy(found.targets + found.target_size, line, size);
		found.target_size += size;
	}
}

void target(const void *address, const char *what)
{
	add_target(address, "", what);
}

void target_once(const void *address, const char *what)
{
	add_target(address, "!", what);
}

/* --- the surroundings, which stay the same in namespaces of our own --- */

static void note_surroundings(void)
{
	if (has_argument("surroundings"))
		surroundings_note();
}

static void check_surroundings(void)
{
	if (has_argument("surroundings"))
		surroundings_check();
}

/* --- the family --- */

static void send_all(int fd, const void *data, size_t size)
{
	if (send(fd, data, size, MSG_NOSIGNAL) != (ssize_t)size)
		_exit(0);
}

/* The other side is gone: false. */
static bool receive(int fd, void *data, size_t size)
{
	ssize_t got;

	do
		got = recv(fd, data, size, MSG_WAITALL);
	while (got < 0 && errno == EINTR);
	return got == (ssize_t)size;
}

static void run_child(int fd, int number, void (*begin)(int), void (*serve)(unsigned, unsigned))
{
	struct request request;

	for (int i = 0; i < child_count; i++)
		close(children[i].fd);
	child_count = 0;
	begin_findings();
	begin(number);
	note_surroundings();
	send_all(fd, &found, sizeof(found));
	while (receive(fd, &request, sizeof(request))) {
		begin_findings();
		check_surroundings();
		serve(request.round, request.phase);
		send_all(fd, &found, sizeof(found));
	}
	_exit(0);
}

int start_child(int number, void (*begin)(int), void (*serve)(unsigned, unsigned))
{
	struct child *child = &children[child_count];
	int pair[2];

	if (child_count == CHILDREN)
		die("too many children");
	check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), "socketpair");
	child->pid = check(fork(), "fork");
	if (!child->pid) {
		close(pair[0]);
		run_child(pair[1], number, begin, serve);
	}
	close(pair[1]);
	child->fd = pair[0];
	if (!receive(child->fd, &theirs, sizeof(theirs)))
		die("a child did not begin");
	take_over(&theirs);
	return child_count++;
}

static void hear(const struct child *child)
{
	if (expect(receive(child->fd, &theirs, sizeof(theirs)), "child %d is gone", child->pid))
		take_over(&theirs);
}

static bool request(const struct child *child, unsigned round, unsigned phase)
{
	struct request asked = {round, phase};

	return expect(send(child->fd, &asked, sizeof(asked), MSG_NOSIGNAL) == sizeof(asked),
		      "child %d does not listen", child->pid);
}

void ask_child(int index, unsigned round, unsigned phase)
{
	if (request(&children[index], round, phase))
		hear(&children[index]);
}

void ask_children(unsigned round, unsigned phase)
{
	bool asked[CHILDREN] = {false};

	for (int i = 0; i < child_count; i++)
		asked[i] = request(&children[i], round, phase);
	for (int i = 0; i < child_count; i++)
		if (asked[i])
			hear(&children[i]);
}

void in_new_child(void (*look)(unsigned), unsigned round)
{
	int pair[2], status;
	pid_t pid;

	check(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), "socketpair");
	pid = check(fork(), "fork");
	if (!pid) {
		begin_findings();
		look(round);
		send_all(pair[1], &found, sizeof(found));
		_exit(42);
	}
	close(pair[1]);
	if (expect(receive(pair[0], &theirs, sizeof(theirs)), "a new child says nothing"))
		take_over(&theirs);
	close(pair[0]);
	expect(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 42,
	       "a new child ends with status %#x", status);
}

/* --- the protocol --- */

static int poke(pid_t pid, unsigned long address)
{
	unsigned char byte;
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	fd = open(path, O_RDWR);
	if (fd < 0 || pread(fd, &byte, 1, address) != 1)
		die(path);
	byte = ~byte;
	if (pwrite(fd, &byte, 1, address) != 1)
		die("poke");
	return 0;
}

static void say(unsigned round)
{
	static char text[NOTES * (NOTE + 8) + 128];
	size_t used;

	used = sprintf(text, "{\"ok\": %s, \"checks\": %lu, \"round\": %u, \"wrong\": [",
		       found.wrong ? "false" : "true", found.checks, round);
	for (unsigned i = 0; i < found.wrong && i < NOTES; i++)
		used += sprintf(text + used, "%s\"%s\"", i ? ", " : "", found.notes[i]);
	used += sprintf(text + used, "]}\n");
	publish("answer", text, used);
}

void serve_root(void)
{
	char text[32];
	sigset_t wanted;
	int got;

	sigemptyset(&wanted);
	sigaddset(&wanted, SIGUSR1);
	if (found.wrong)
		die(found.notes[0]);
	note_surroundings();
	publish("targets", found.targets, found.target_size);
	publish("ready", text, snprintf(text, sizeof(text), "%d\n", getpid()));
	for (unsigned round = 1;;) {
		if (sigwait(&wanted, &got))
			continue;
		begin_findings();
		check_surroundings();
		answer(round);
		say(round++);
	}
}

static void run(void)
{
	sigset_t blocked;

	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigprocmask(SIG_BLOCK, &blocked, NULL);
	if (getsid(0) != getpid())
		check(setsid(), "setsid"); /* CRIU wants a tree to be a session of its own */
	set_up();
	serve_root();
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "--poke"))
		return poke(atoi(argv[2]), strtoul(argv[3], NULL, 0));
	if (argc == 3 && !strcmp(argv[1], "--prepare")) {
		directory = argv[2];
		prepare();
		return 0;
	}
	if (argc < 2 || argv[1][0] == '-') {
		dprintf(2, "usage: %s DIR [WORD...] | --prepare DIR | --poke PID ADDRESS\n",
			argv[0]);
		return 2;
	}
	directory = argv[1];
	words = argv + 2;
	run();
}
