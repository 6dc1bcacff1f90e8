/*
 * The pool: a CRIU started in advance, with memory that is allocated already.
 *
 * It is a child of the agent, waits in the constructor of a preloaded library
 * (warm/), and becomes the CRIU of the next restore that uses the pool. It
 * serves one restore, or ends with the session that it was made for. The OOM
 * killer chooses it before any other process, and it dies with the agent.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "warm.h"
#include "warm_library.h"

#define DEATH_MS 10000
#define SPARE (64ull << 20) /* bytes left to the guest */

struct warm_pool pool = {.socket = -1, .note = "none was made"};

void pool_unmap(struct pool_state **state)
{
	if (*state)
		munmap(*state, POOL_PAGE);
	*state = NULL;
}

void pool_forget(void)
{
	close_fd(&pool.socket);
	pool_unmap(&pool.state);
	pool.stage = NONE;
	pool.pid = 0;
	pool.owner = NULL;
}

/* ------------------------------------------------------------------------ creation */

/* A memfd with the library and, behind it, a page shared with the process that loads it. */
static int make_library(struct pool_state **state)
{
	size_t size = (sizeof(warm_library) + POOL_PAGE - 1) & ~(size_t)(POOL_PAGE - 1);
	int fd = memfd_create("ovr-warm", MFD_CLOEXEC);

	*state = NULL;
	if (fd < 0)
		return -1;
	if (ftruncate(fd, (off_t)(size + POOL_PAGE)) == 0 &&
	    write(fd, warm_library, sizeof(warm_library)) == (ssize_t)sizeof(warm_library)) {
		*state = mmap(NULL, POOL_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)size);
		if (*state != MAP_FAILED)
			return fd;
	}
	*state = NULL;
	close(fd);
	return -1;
}

static enum pool_huge huge_pages(void)
{
	char text[64] = "";
	FILE *file = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "re");

	if (file && !fgets(text, sizeof(text), file))
		text[0] = 0;
	if (file)
		fclose(file);
	if (strstr(text, "[always]"))
		return POOL_HUGE_ALWAYS;
	return strstr(text, "[madvise]") ? POOL_HUGE_ASKED : POOL_HUGE_NEVER;
}

static pid_t start(struct child_io io)
{
	char *argv[POOL_ARGUMENTS + 1] = {(char *)(uintptr_t)options.criu, "restore"};
	/* The library looks for the first variable to know that it is in the pool's CRIU. */
	char *env[] = {"LD_PRELOAD=/proc/self/fd/0", AGENT_PATH, NULL};

	for (int i = 2; i < POOL_ARGUMENTS; i++)
		argv[i] = POOL_PADDING;
	return child_start(argv, env, io);
}

/* 0, or an errno. */
static int make(uint64_t size, uint64_t place)
{
	struct child_io io = {-1, -1, -1};
	int ends[2] = {-1, -1}, error;

	io.in = make_library(&pool.state);
	if (io.in >= 0 && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0) {
		io.out = ends[1];
		pool.state->wanted = size;
		pool.state->place = place;
		pool.state->agent = (uint64_t)getpid();
		pool.state->huge = huge_pages();
		pool.pid = start(io);
	}
	error = errno;
	close_fd(&io.in);
	close_fd(&ends[1]);
	pool.socket = ends[0];
	if (pool.pid <= 0) {
		pool_forget();
		return error;
	}
	pool.stage = FILLING;
	return 0;
}

/* ------------------------------------------------------------------------ end */

static void answer(void);

static void lost(enum code code, const char *why)
{
	if (pool.state && pool.state->error)
		code = code_of_errno((int)pool.state->error);
	if (pool.state && pool.state->error)
		snprintf(pool.note, sizeof(pool.note), "it could not %.39s: %s", pool.state->step,
			 strerror((int)pool.state->error));
	else
		snprintf(pool.note, sizeof(pool.note), "%s", why);
	complain("the pool is gone: %s", pool.note);
	if (pool.waiting)
		session_refuse(pool.waiting, code, "no pool: %s", pool.note);
	pool.waiting = NULL;
	pool_forget();
}

void pool_end(const char *why)
{
	int64_t deadline = now_ms() + DEATH_MS;
	pid_t pid = pool.pid;

	if (pool.stage == NONE)
		return;
	kill(pid, SIGKILL);
	while (pool.stage != NONE && now_ms() < deadline) {
		snprintf(pool.note, sizeof(pool.note), "%s", why);
		reap_children();
		sleep_ms(1);
	}
	snprintf(pool.note, sizeof(pool.note), "%s", why);
	pool_forget();
}

bool warm_owns(pid_t pid)
{
	return prime_owns(pid) || (pool.stage != NONE && pool.pid == pid);
}

bool warm_reaped(pid_t pid, int status)
{
	bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
	char why[80];

	if (prime_reaped(pid)) {
		answer();
		return true;
	}
	if (!warm_owns(pid))
		return false;
	if (killed)
		snprintf(why, sizeof(why), "it was killed; the guest needed the memory");
	else
		snprintf(why, sizeof(why), "its process ended (%d)", status);
	lost(killed ? CODE_KILLED : CODE_POOL, why);
	return true;
}

void warm_shutdown(void)
{
	pool_end("the agent is shutting down");
}

/* ------------------------------------------------------------------------ messages */

/* Bytes of the pool in huge pages, as counted by the kernel. */
static uint64_t huge_bytes(void)
{
	unsigned long long kib = 0;
	char path[64], line[128];
	FILE *file;

	snprintf(path, sizeof(path), "/proc/%d/smaps_rollup", pool.pid);
	file = fopen(path, "re");
	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "AnonHugePages: %llu", &kib) == 1)
			break;
	if (file)
		fclose(file);
	return kib << 10;
}

static void report(struct session *session)
{
	struct writer writer = session_writer(session, OP_WARMED);
	bool ready = pool.stage == READY;

	message_add_uint(&writer, KEY_SIZE, ready ? pool.state->wanted : 0);
	message_add_uint(&writer, KEY_HUGE, ready ? huge_bytes() : 0);
	message_add_uint(&writer, KEY_PID, ready ? (uint64_t)pool.pid : 0);
	message_add_uint(&writer, KEY_ADDRESS, ready ? pool.state->base : 0);
	if (pool.stage == FILLING)
		message_add_str(&writer, KEY_NOTE, "it is being filled");
	else
		message_add_str(&writer, KEY_NOTE, ready ? "" : pool.note);
	session_send(session, &writer);
}

/* Answer the Warm when all is done. */
static void answer(void)
{
	struct session *waiting = pool.waiting;

	if (pool.stage != READY || prime_under_way() || !waiting)
		return;
	pool.waiting = NULL;
	report(waiting);
}

static uint64_t available_bytes(void)
{
	unsigned long long kib = 0;
	FILE *file = fopen("/proc/meminfo", "re");
	char line[128];

	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
			break;
	if (file)
		fclose(file);
	return kib << 10;
}

static void warm(struct session *session, uint64_t size, uint64_t place, bool keep)
{
	uint64_t available;
	int error;

	if (pool.stage == FILLING || pool.waiting) {
		session_refuse(session, CODE_BUSY, "a pool is being filled already");
		return;
	}
	if (place >= POOL_SPAN || place % POOL_UNIT) {
		session_refuse(session, CODE_PROTOCOL,
			       "the pool's place is not a multiple of the huge page size");
		return;
	}
	available = available_bytes() + warm_size();
	size = (size + POOL_UNIT - 1) & ~(POOL_UNIT - 1);
	if (size > POOL_MAX || size + SPARE > available) {
		session_refuse(session, CODE_NO_MEMORY,
			       "the guest has %llu MiB of memory available, too little for "
			       "a pool of %llu MiB",
			       (unsigned long long)available >> 20, (unsigned long long)size >> 20);
		return;
	}
	pool_end("it was replaced by another pool");
	error = make(size, place);
	if (error) {
		session_refuse(session, code_of_errno(error), "no pool: %s", strerror(error));
		return;
	}
	pool.waiting = session;
	pool.owner = keep ? NULL : session;
	prime_begin();
}

void warm_message(struct session *session, const struct message *message)
{
	uint64_t size = message_has(message, KEY_SIZE) ? message_uint(message, KEY_SIZE) : 0;

	if (message->op == OP_WARM && size) {
		warm(session, size, message_uint(message, KEY_PLACE),
		     message_uint(message, KEY_KEEP));
		return;
	}
	if (message->op == OP_WARM) {
		if (pool.waiting)
			session_refuse(pool.waiting, CODE_POOL, "the pool was discarded");
		pool.waiting = NULL;
		pool_end("it was discarded");
	}
	report(session);
}

void warm_session_ended(struct session *session)
{
	if (pool.waiting == session)
		pool.waiting = NULL;
	if (pool.owner == session)
		pool_end("its session ended");
}

static void on_news(int fd, short events, void *context)
{
	char word;

	(void)events, (void)context;
	if (fd != pool.socket)
		return;
	if (pool.stage != FILLING || recv(fd, &word, 1, MSG_DONTWAIT) <= 0) {
		/* The process is exiting; its status gives the reason. */
		shutdown(fd, SHUT_RDWR);
		close_fd(&pool.socket);
		return;
	}
	pool.stage = READY;
	answer();
}

void warm_watch(struct loop *loop)
{
	if (pool.socket >= 0)
		loop_watch(loop, pool.socket, POLLIN, on_news, NULL);
	prime_watch(loop);
}

uint64_t warm_address(void)
{
	return pool.stage == READY ? pool.state->base : 0;
}

uint64_t warm_size(void)
{
	return pool.stage == READY ? pool.state->wanted : 0;
}
