/*
 * Finding and killing the tree that CRIU makes.
 *
 * Why nothing escapes. CRIU is stopped first (SIGSTOP, and seen stopped), so
 * it can neither make tasks, nor detach from them, nor take the end of its
 * script for leave to go on; nor die, which would release what it traces.
 * Then every member gets SIGSTOP until two looks in a row find nobody new:
 * what is still being built cannot fork past us. Then SIGKILL, which ptrace
 * does not hold up, until every member is gone or a zombie. CRIU, whose death
 * now releases nobody, is killed last, by the caller.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

#define KILL_MS 10000
#define STOP_MS 5000
#define MAX_LOOKS 100
#define PF_EXITING 0x4		/* include/linux/sched.h */

struct process {
	pid_t pid, parent, tracer;
	char state;
	int threads;
	bool member;
};

struct table {
	struct process *processes;
	size_t count, room;
};

static int field(const char *status, const char *name)
{
	const char *at = strstr(status, name);

	return at ? atoi(at + strlen(name)) : 0;
}

static bool read_status(const char *path, struct process *process)
{
	char text[4096];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	const char *state;

	if (fd >= 0)
		close(fd);
	if (size <= 0)
		return false;
	text[size] = 0;
	/* The name stands before everything, but the kernel escapes newlines in it. */
	state = strstr(text, "\nState:\t");
	*process = (struct process){
		.state = state ? state[8] : '?',
		.pid = field(text, "\nPid:\t"), .parent = field(text, "\nPPid:\t"),
		.tracer = field(text, "\nTracerPid:\t"), .threads = field(text, "\nThreads:\t"),
	};
	return process->pid > 0;
}

static bool dead(const struct process *process)
{
	return process->state == 'Z' || process->state == 'X';
}

/*
 * Will it never run again? The init of a pid namespace that dies waits until
 * all others there are reaped; those that CRIU traces, which is stopped, are
 * not before CRIU dies.
 */
static bool exiting(pid_t pid)
{
	char path[64], text[512], *at;
	unsigned long flags = 0;
	ssize_t size;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	text[size > 0 ? size : 0] = 0;
	/* The name may hold anything, but the last parenthesis ends it. */
	at = strrchr(text, ')');
	if (!at || sscanf(at + 1, " %*c %*d %*d %*d %*d %*d %lu", &flags) != 1)
		return false;
	return flags & PF_EXITING;
}

/*
 * A dead leader is a zombie while other threads still live; and dead threads
 * are still counted until their tracer, who is stopped, has waited for them.
 */
static bool alive(const struct process *process)
{
	struct process thread;
	struct dirent *entry;
	bool found = false;
	char path[320];
	DIR *tasks;

	if (!dead(process) && !exiting(process->pid))
		return true;
	if (process->threads <= 1)
		return false;
	snprintf(path, sizeof(path), "/proc/%d/task", process->pid);
	tasks = opendir(path);
	while (tasks && !found && (entry = readdir(tasks))) {
		snprintf(path, sizeof(path), "/proc/%d/task/%s/status", process->pid, entry->d_name);
		found = entry->d_name[0] != '.' && read_status(path, &thread) && !dead(&thread) &&
			!exiting(thread.pid);
	}
	if (tasks)
		closedir(tasks);
	return found;
}

static bool add(struct table *table, const struct process *process)
{
	if (table->count == table->room) {
		size_t room = table->room ? 2 * table->room : 1024;
		struct process *bigger = realloc(table->processes, room * sizeof(*bigger));

		if (!bigger)
			return false;
		table->processes = bigger;
		table->room = room;
	}
	table->processes[table->count++] = *process;
	return true;
}

static int by_pid(const void *a, const void *b)
{
	const struct process *left = a, *right = b;

	return (left->pid > right->pid) - (left->pid < right->pid);
}

/* False when the picture is not whole: no memory, no /proc. */
static bool read_processes(struct table *table)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	struct process process;
	char path[300];
	bool whole = proc;

	table->count = 0;
	while (whole && (entry = readdir(proc))) {
		if (entry->d_name[0] < '1' || entry->d_name[0] > '9')
			continue;
		snprintf(path, sizeof(path), "/proc/%s/status", entry->d_name);
		if (read_status(path, &process))
			whole = add(table, &process);
	}
	if (proc)
		closedir(proc);
	qsort(table->processes, table->count, sizeof(*table->processes), by_pid);
	return whole;
}

static bool never_a_member(const struct tree *tree, const struct process *process)
{
	return process->pid == 1 || process->pid == tree->criu || process->pid == getpid();
}

static bool is_top(const struct tree *tree, const struct process *process)
{
	if (tree->criu > 1 && (process->parent == tree->criu || process->tracer == tree->criu))
		return true;
	if (tree->root > 1 && process->pid == tree->root)
		return true;
	if (tree->runtime > 1 && process->parent == tree->runtime)
		return true;
	return tree->orphans && process->parent == getpid() && !lab_owns(process->pid) &&
	       !warm_owns(process->pid);
}

static struct process *find(const struct table *table, pid_t pid)
{
	struct process key = {.pid = pid};

	return bsearch(&key, table->processes, table->count, sizeof(key), by_pid);
}

static void mark(struct table *table, const struct tree *tree)
{
	bool news = true;

	for (size_t i = 0; i < table->count; i++)
		table->processes[i].member = !never_a_member(tree, &table->processes[i]) &&
					     is_top(tree, &table->processes[i]);
	while (news) {
		news = false;
		for (size_t i = 0; i < table->count; i++) {
			struct process *process = &table->processes[i], *parent;

			if (process->member || never_a_member(tree, process))
				continue;
			parent = find(table, process->parent);
			news |= process->member = parent && parent->member;
		}
	}
}

/*
 * How many live members got the signal (SIZE_MAX when that is not known).
 * Together with their `sum` it tells two looks apart.
 */
static size_t signal_members(struct table *table, struct tree *tree, int signal_number,
			     uint64_t *sum)
{
	struct process *root;
	size_t count = 0;

	*sum = 0;
	if (!read_processes(table))
		return SIZE_MAX;
	root = find(table, tree->root);
	/* Once reaped, its pid may be anybody's. */
	if (!root || !alive(root))
		tree->root = 0;
	mark(table, tree);
	for (size_t i = 0; i < table->count; i++) {
		struct process *process = &table->processes[i];

		if (!process->member || !alive(process))
			continue;
		kill(process->pid, signal_number);
		*sum += (uint64_t)process->pid * (uint64_t)process->pid;
		count++;
	}
	return count;
}

static void stop_members(struct table *table, struct tree *tree)
{
	uint64_t sum, last_sum = 0;
	size_t count, last = SIZE_MAX;

	for (int look = 0; look < MAX_LOOKS; look++) {
		count = signal_members(table, tree, SIGSTOP, &sum);
		if (!count || (count == last && sum == last_sum))
			return;
		last = count;
		last_sum = sum;
		sleep_ms(1);
	}
}

bool tree_kill(struct tree tree)
{
	int64_t deadline = now_ms() + KILL_MS;
	struct table table = {0};
	uint64_t sum;
	bool gone;
	int nap = 1;

	stop_members(&table, &tree);
	while (!(gone = !signal_members(&table, &tree, SIGKILL, &sum)) && now_ms() < deadline) {
		sleep_ms(nap);
		nap = nap < 20 ? 2 * nap : nap;
		reap_children();
	}
	free(table.processes);
	return gone;
}

bool tree_stop_criu(pid_t criu)
{
	int64_t deadline = now_ms() + STOP_MS;
	struct process process;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/status", criu);
	kill(criu, SIGSTOP);
	while (now_ms() < deadline) {
		if (!read_status(path, &process) || strchr("TtZX", process.state))
			return true;
		sleep_ms(1);
	}
	return false;
}

pid_t tree_tracer(pid_t pid)
{
	struct process process;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	return read_status(path, &process) ? process.tracer : 0;
}

pid_t tree_parent(pid_t pid)
{
	struct process process;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	return read_status(path, &process) ? process.parent : 0;
}

static int traced_threads(pid_t pid, pid_t criu, uint32_t ids[MAX_TREE], int count)
{
	char path[320];
	DIR *tasks;
	struct dirent *entry;
	struct process thread;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	tasks = opendir(path);
	while (tasks && count >= 0 && (entry = readdir(tasks))) {
		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof(path), "/proc/%d/task/%s/status", pid, entry->d_name);
		if (!read_status(path, &thread) || thread.tracer != criu)
			continue;
		if (count == MAX_TREE)
			count = -1;
		else
			ids[count++] = (uint32_t)thread.pid;
	}
	if (tasks)
		closedir(tasks);
	return count;
}

int tree_traced(pid_t criu, uint32_t ids[MAX_TREE])
{
	struct table table = {0};
	int count = 0;

	if (!read_processes(&table))
		count = -1;
	for (size_t i = 0; i < table.count && count >= 0; i++)
		if (table.processes[i].tracer == criu || table.processes[i].threads > 1)
			count = traced_threads(table.processes[i].pid, criu, ids, count);
	free(table.processes);
	return count;
}
