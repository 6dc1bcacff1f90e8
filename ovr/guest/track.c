/*
 * Clear the soft-dirty bits of a running tree. If the host wants to look at them before that, the
 * tree is frozen until they are cleared: a write in between would be lost.
 *
 * A worker, a child of the agent, does it. It stops all threads by ptrace, as CRIU does
 * (criu/seize.c). However it ends, by its alarm, by a signal or with the agent, the kernel lets them
 * run on.
 */
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "processes.h"
#include "restore.h"

#define STOP_SECONDS 5
#define LOOK_SECONDS 10
#define PID_MAX_LIMIT (1 << 22) /* include/linux/threads.h */

struct word {
	bool done;   /* bits cleared, and the tree runs; otherwise it is frozen */
	uint64_t us; /* for how long it was frozen */
};

static struct {
	pid_t pid;     /* 0: it has exited */
	int words;     /* socket to the worker; -1: there is none */
	bool may_look; /* the tree is frozen: the host's turn */
} worker = {.words = -1};

/* ------------------------------------------------------------------------ in the worker */

struct thread {
	pid_t id;
	int signal; /* to be delivered when it is released, or 0 */
};

static struct thread threads[MAX_TREE];
static size_t count;
static uint8_t seized[PID_MAX_LIMIT / 8];

/* Whether the thread has died, in which case it cannot be stopped, and need not be. */
static bool gone(pid_t id)
{
	struct process thread;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/status", id);
	return !process_read(path, &thread) || process_dead(&thread);
}

static bool seize(pid_t id)
{
	if (id <= 0 || id >= PID_MAX_LIMIT || seized[id / 8] & (1 << id % 8))
		return true;
	if (ptrace(PTRACE_SEIZE, id, NULL, NULL) < 0)
		return gone(id);
	if (count == MAX_TREE)
		return false;
	seized[id / 8] |= (uint8_t)(1 << id % 8);
	threads[count++].id = id;
	ptrace(PTRACE_INTERRUPT, id, NULL, NULL);
	return true;
}

static bool seize_threads(pid_t pid)
{
	struct dirent *entry;
	char path[64];
	bool done = true;
	DIR *tasks;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	tasks = opendir(path);
	while (tasks && done && (entry = readdir(tasks)))
		done = entry->d_name[0] == '.' || seize(atoi(entry->d_name));
	if (tasks)
		closedir(tasks);
	return done;
}

/* A thread that is about to take a signal stops before it does, and takes it when it is released. */
static void await_stop(struct thread *thread)
{
	int status;

	if (waitpid(thread->id, &status, __WALL) == thread->id && WIFSTOPPED(status) &&
	    status >> 16 != PTRACE_EVENT_STOP)
		thread->signal = WSTOPSIG(status);
}

/* Until a look finds no new thread: those that had stopped before it cannot have made any. */
static bool stop_all(pid_t root)
{
	struct tree tree = {.root = root};
	struct table table = {0};
	size_t before;
	bool done;

	do {
		before = count;
		done = table_read(&table);
		table_mark(&table, &tree);
		for (size_t i = 0; i < table.count && done; i++)
			if (table.processes[i].member)
				done = seize_threads(table.processes[i].pid);
		for (size_t i = before; i < count; i++)
			await_stop(&threads[i]);
	} while (done && count > before);
	free(table.processes);
	return done && count;
}

static void release(void)
{
	for (size_t i = 0; i < count; i++)
		ptrace(PTRACE_DETACH, threads[i].id, NULL, threads[i].signal);
}

static bool say(int words, bool done, uint64_t us)
{
	struct word word = {done, us};

	return send(words, &word, sizeof(word), MSG_NOSIGNAL) == sizeof(word);
}

/* Freeze the tree until the agent says to go on. */
static bool freeze(pid_t root, int words)
{
	char word;

	alarm(STOP_SECONDS);
	if (!stop_all(root))
		return false;
	alarm(LOOK_SECONDS);
	return say(words, false, 0) && recv(words, &word, 1, 0) == 1;
}

static void work(pid_t root, bool look, int out)
{
	const int words = 3;
	int64_t start;
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	/* The agent's other descriptors stay its own. */
	if (dup2(out, words) < 0 || syscall(SYS_close_range, words + 1, ~0u, 0) < 0)
		_exit(1);
	priority_real_time(0);
	start = now_us();
	if (look && !freeze(root, words))
		_exit(1);
	tree_clear_refs(root);
	release();
	_exit(!say(words, true, look ? (uint64_t)(now_us() - start) : 0));
}

/* ------------------------------------------------------------------------ in the agent */

bool track_begin(pid_t root, bool look)
{
	int words[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, words) < 0)
		return false;
	worker.pid = fork();
	if (!worker.pid)
		work(root, look, words[1]);
	close(words[1]);
	if (worker.pid < 0) {
		worker.pid = 0;
		close(words[0]);
		return false;
	}
	worker.words = words[0];
	worker.may_look = false;
	return true;
}

bool track_under_way(void)
{
	return worker.words >= 0;
}

bool track_may_look(void)
{
	return worker.may_look;
}

void track_looked(void)
{
	worker.may_look = false;
	/* If it is gone, on_word() says so. */
	send(worker.words, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT);
}

void track_end(void)
{
	if (worker.pid)
		kill(worker.pid, SIGKILL);
	worker.pid = 0;
	worker.may_look = false;
	close_fd(&worker.words);
}

bool track_reaped(pid_t pid)
{
	if (!worker.pid || pid != worker.pid)
		return false;
	worker.pid = 0;
	return true;
}

static void on_word(int fd, short events, void *context)
{
	struct word word;

	(void)events, (void)context;
	if (fd != worker.words)
		return;
	if (recv(fd, &word, sizeof(word), MSG_DONTWAIT) != sizeof(word)) {
		track_end();
		restore_abort(CODE_TREE, "the tree cannot be frozen, or was frozen for too long");
	} else if (word.done) {
		track_end();
		dump_tracked(word.us);
	} else {
		worker.may_look = true;
		dump_frozen();
	}
}

void track_watch(struct loop *loop)
{
	if (worker.words >= 0)
		loop_watch(loop, worker.words, POLLIN, on_word, NULL);
}
