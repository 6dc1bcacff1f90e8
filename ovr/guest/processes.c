/* Read the guest's processes from /proc, and mark the members of a tree. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "processes.h"

#define PF_EXITING 0x4 /* include/linux/sched.h */

static int field(const char *status, const char *name)
{
	const char *at = strstr(status, name);

	return at ? atoi(at + strlen(name)) : 0;
}

bool process_read(const char *path, struct process *process)
{
	/* The line before the number of threads has up to NGROUPS_MAX groups. */
	static char text[512 << 10];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	const char *state;

	if (fd >= 0)
		close(fd);
	if (size <= 0)
		return false;
	text[size] = 0;
	/* The first line is the name, in which the kernel escapes newlines. */
	state = strstr(text, "\nState:\t");
	*process = (struct process){
		.state = state ? state[8] : '?',
		.pid = field(text, "\nPid:\t"),
		.parent = field(text, "\nPPid:\t"),
		.tracer = field(text, "\nTracerPid:\t"),
		.threads = field(text, "\nThreads:\t"),
	};
	return process->pid > 0;
}

bool process_dead(const struct process *process)
{
	return process->state == 'Z' || process->state == 'X';
}

/* The process's /proc/PID/stat from the state on; NULL if it is gone. */
const char *process_stat(pid_t pid, char text[512])
{
	char path[64], *name_end;
	ssize_t size;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	size = fd < 0 ? -1 : read(fd, text, 511);
	if (fd >= 0)
		close(fd);
	text[size > 0 ? size : 0] = 0;
	/* The name may contain any character, but the last parenthesis ends it. */
	name_end = strrchr(text, ')');
	return name_end ? name_end + 1 : NULL;
}

/*
 * Whether the task is exiting and will not return to user mode. A dying init of
 * a pid namespace waits until all others in it are reaped, and those traced by
 * the stopped CRIU are not reaped before CRIU dies.
 */
static bool exiting(pid_t pid)
{
	unsigned long flags = 0;
	char text[512];
	const char *stat = process_stat(pid, text);

	if (!stat || sscanf(stat, " %*c %*d %*d %*d %*d %*d %lu", &flags) != 1)
		return false;
	return flags & PF_EXITING;
}

/*
 * A dead leader is a zombie while other threads live; dead threads are counted
 * until their tracer, which is stopped, has waited for them.
 */
bool process_alive(const struct process *process)
{
	struct process thread;
	struct dirent *entry;
	bool found = false;
	char path[320];
	DIR *tasks;

	if (!process_dead(process) && !exiting(process->pid))
		return true;
	if (process->threads <= 1)
		return false;
	snprintf(path, sizeof(path), "/proc/%d/task", process->pid);
	tasks = opendir(path);
	while (tasks && !found && (entry = readdir(tasks))) {
		snprintf(path, sizeof(path), "/proc/%d/task/%s/status", process->pid,
			 entry->d_name);
		found = entry->d_name[0] != '.' && process_read(path, &thread) &&
			!process_dead(&thread) && !exiting(thread.pid);
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

/* False if the table is incomplete: no memory, no /proc. */
bool table_read(struct table *table)
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
		if (process_read(path, &process))
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
	if (tree->engine > 1 && process->parent == tree->engine)
		return true;
	return tree->orphans && process->parent == getpid() && !lab_owns(process->pid) &&
	       !warm_owns(process->pid) && !find_owns(process->pid);
}

struct process *table_find(const struct table *table, pid_t pid)
{
	struct process key = {.pid = pid};

	return bsearch(&key, table->processes, table->count, sizeof(key), by_pid);
}

void table_mark(struct table *table, const struct tree *tree)
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
			parent = table_find(table, process->parent);
			news |= process->member = parent && parent->member;
		}
	}
}
