/*
 * Find and kill the tree that CRIU builds.
 *
 * No task escapes. CRIU is stopped first (SIGSTOP, and confirmed stopped), so
 * it can neither create tasks, nor detach from them, nor continue when its
 * script ends; nor exit, which would release its tracees. Then all members get
 * SIGSTOP until two consecutive scans find the same ones, so that tasks under
 * construction cannot fork unnoticed. Then SIGKILL, which ptrace does not
 * delay, until every member is gone or a zombie. CRIU, whose death now releases
 * no task, is killed last, by the caller.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "processes.h"

#define KILL_MS 10000
#define STOP_MS 5000
#define MAX_LOOKS 100

/*
 * Signal all live members. Returns their number, SIZE_MAX if it is not known.
 * Number and `sum` together identify the set of members.
 */
static size_t signal_members(struct table *table, struct tree *tree, int signal_number,
			     uint64_t *sum)
{
	struct process *root;
	size_t count = 0;

	*sum = 0;
	if (!table_read(table))
		return SIZE_MAX;
	root = table_find(table, tree->root);
	/* Once the root is reaped, its pid may be reused. */
	if (!root || !process_alive(root))
		tree->root = 0;
	table_mark(table, tree);
	for (size_t i = 0; i < table->count; i++) {
		struct process *process = &table->processes[i];

		if (!process->member || !process_alive(process))
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
	size_t left, least = SIZE_MAX;
	uint64_t sum;
	int nap = 1;

	stop_members(&table, &tree);
	while ((left = signal_members(&table, &tree, SIGKILL, &sum)) && now_ms() < deadline) {
		/* Any number of tasks may take its time, as long as the number decreases. */
		if (left < least) {
			least = left;
			deadline = now_ms() + KILL_MS;
		}
		sleep_ms(nap);
		nap = nap < 20 ? 2 * nap : nap;
		reap_children();
	}
	free(table.processes);
	return !left;
}

static void clear_refs(pid_t pid)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/clear_refs", pid);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	/* 4: the soft-dirty bits; Documentation/admin-guide/mm/soft-dirty.rst */
	if (fd < 0 || write(fd, "4", 1) != 1)
		complain("%s: %s", path, strerror(errno));
	if (fd >= 0)
		close(fd);
}

void tree_clear_refs(pid_t root)
{
	struct tree tree = {.root = root};
	struct table table = {0};

	if (table_read(&table))
		table_mark(&table, &tree);
	for (size_t i = 0; i < table.count; i++)
		if (table.processes[i].member && process_alive(&table.processes[i]))
			clear_refs(table.processes[i].pid);
	free(table.processes);
}

void tree_renice_zombies(struct tree tree, int nice)
{
	struct table table = {0};

	if (table_read(&table))
		table_mark(&table, &tree);
	for (size_t i = 0; i < table.count; i++)
		if (table.processes[i].member && process_dead(&table.processes[i]))
			setpriority(PRIO_PROCESS, (id_t)table.processes[i].pid, nice);
	free(table.processes);
}

bool tree_stop_criu(pid_t criu)
{
	int64_t deadline = now_ms() + STOP_MS;
	struct process process;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/status", criu);
	kill(criu, SIGSTOP);
	while (now_ms() < deadline) {
		if (!process_read(path, &process) || strchr("TtZX", process.state))
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
	return process_read(path, &process) ? process.tracer : 0;
}

pid_t tree_parent(pid_t pid)
{
	struct process process;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	return process_read(path, &process) ? process.parent : 0;
}

bool tree_descends(pid_t pid, pid_t ancestor)
{
	while (pid > 1 && pid != ancestor)
		pid = tree_parent(pid);
	return pid > 1;
}

bool tree_task_lives(pid_t pid)
{
	struct process process;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/status", pid);
	return pid > 1 && process_read(path, &process) && process_alive(&process);
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
		if (!process_read(path, &thread) || thread.tracer != criu)
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

	if (!table_read(&table))
		count = -1;
	for (size_t i = 0; i < table.count && count >= 0; i++)
		if (table.processes[i].tracer == criu || table.processes[i].threads > 1)
			count = traced_threads(table.processes[i].pid, criu, ids, count);
	free(table.processes);
	return count;
}
