/*
 * Looking at a guest, and doing something to it, without the dozens of processes of a shell: under TCG
 * on a busy host each takes a tenth of a second.
 *
 *     ovr-look                what is there: "NAME COUNT" lines
 *     ovr-look kill VICTIM    SIGKILL to one of: agent, hook, criu, root, task; "killed" if there is one
 *     ovr-look end            kill the tree of ovr-subject, wait until it is gone, remove its marks
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"

#define SUBJECT "/usr/local/bin/ovr-subject"
#define AGENT "ovr-agent"
#define CRIU "criu"
#define ROOT 21000 /* as in __init__.py */
#define MOST 4096

struct process {
	pid_t pid, parent;
	char name[32], state;
	bool subject; /* by its program: a half-restored task has another name */
};

static struct process table[MOST];
static int count;

static bool read_stat(const char *path, struct process *process)
{
	char text[512];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	if (size <= 0)
		return false;
	text[size] = 0;
	return sscanf(text, "%d (%31[^)]) %c %d", &process->pid, process->name, &process->state,
		      &process->parent) == 4;
}

static void read_table(void)
{
	DIR *proc = opendir("/proc");
	struct dirent *entry;
	char path[300], program[300];
	ssize_t size;

	count = 0;
	while (proc && count < MOST && (entry = readdir(proc))) {
		snprintf(path, sizeof(path), "/proc/%s/stat", entry->d_name);
		if (atoi(entry->d_name) <= 0 || !read_stat(path, &table[count]))
			continue;
		snprintf(path, sizeof(path), "/proc/%s/exe", entry->d_name);
		size = readlink(path, program, sizeof(program) - 1);
		program[size > 0 ? size : 0] = 0;
		table[count++].subject = !strcmp(program, SUBJECT);
	}
	if (proc)
		closedir(proc);
}

static bool is(const struct process *process, const char *name)
{
	return !strcmp(process->name, name) && process->state != 'Z' && process->state != 'X';
}

static int subjects(void)
{
	int found = 0;

	for (int i = 0; i < count; i++)
		found += table[i].subject;
	return found;
}

static int number_of(const char *name)
{
	int found = 0;

	for (int i = 0; i < count; i++)
		found += is(&table[i], name);
	return found;
}

static bool is_child_of(const struct process *process, const char *name)
{
	for (int i = 0; i < count; i++)
		if (table[i].pid == process->parent)
			return is(&table[i], name);
	return false;
}

/* Not the hook, nor what the agent has forked. */
static const struct process *agent(void)
{
	for (int i = 0; i < count; i++)
		if (is(&table[i], AGENT) && !is_child_of(&table[i], CRIU) &&
		    !is_child_of(&table[i], AGENT))
			return &table[i];
	return NULL;
}

/* Not a task that it has forked, and that has its name as yet. */
static const struct process *criu(void)
{
	for (int i = 0; i < count; i++)
		if (is(&table[i], CRIU) && !is_child_of(&table[i], CRIU))
			return &table[i];
	return NULL;
}

static const struct process *hook(void)
{
	for (int i = 0; i < count; i++)
		if (is(&table[i], AGENT) && is_child_of(&table[i], CRIU))
			return &table[i];
	return NULL;
}

/* Without the kernel's own, which come and go. */
static int user_processes(void)
{
	int found = 0;

	for (int i = 0; i < count; i++)
		found += table[i].pid != 2 && table[i].parent != 2;
	return found;
}

/* Threads in a stop of ptrace's, or stopped by a signal. */
static int held(void)
{
	struct process thread;
	struct dirent *entry;
	char path[600];
	int found = 0;

	for (int i = 0; i < count; i++) {
		DIR *tasks;

		snprintf(path, sizeof(path), "/proc/%d/task", table[i].pid);
		tasks = opendir(path);
		while (tasks && (entry = readdir(tasks))) {
			snprintf(path, sizeof(path), "/proc/%d/task/%s/stat", table[i].pid,
				 entry->d_name);
			if (entry->d_name[0] != '.' && read_stat(path, &thread))
				found += thread.state == 't' || thread.state == 'T';
		}
		if (tasks)
			closedir(tasks);
	}
	return found;
}

static int entries(const char *path, const char *prefix)
{
	DIR *directory = opendir(path);
	struct dirent *entry;
	int found = 0;

	while (directory && (entry = readdir(directory)))
		found += entry->d_name[0] != '.' && !strncmp(entry->d_name, prefix, strlen(prefix));
	if (directory)
		closedir(directory);
	return found;
}

static int moves;

static int count_move(const char *path, const struct stat *status, int type, struct FTW *where)
{
	(void)status;
	moves += type == FTW_D && !strncmp(path + where->base, "ovr-move-", 9);
	return 0;
}

/* Cgroups of trees that are frozen for a move. */
static int frozen_cgroups(void)
{
	moves = 0;
	nftw("/sys/fs/cgroup", count_move, 16, FTW_PHYS);
	return moves;
}

static int lines_of(const char *path)
{
	FILE *file = fopen(path, "re");
	int found = 0, c;

	while (file && (c = getc(file)) != EOF)
		found += c == '\n';
	if (file)
		fclose(file);
	return found;
}

static long field_of(const char *path, const char *name)
{
	FILE *file = fopen(path, "re");
	char line[256];
	long found = -1;

	while (file && found < 0 && fgets(line, sizeof(line), file))
		if (!strncmp(line, name, strlen(name)))
			found = strtol(line + strlen(name), NULL, 10);
	if (file)
		fclose(file);
	return found;
}

static void look(void)
{
	const struct process *of_agent;
	char path[64];

	read_table();
	of_agent = agent();
	printf("subjects %d\ncriu %d\nagents %d\nheld %d\n", subjects(), number_of(CRIU),
	       number_of(AGENT), held());
	printf("processes %d\n", user_processes());
	printf("restores %d\n", entries("/run/ovr", "restore-"));
	printf("cgroups %d\n", frozen_cgroups());
	printf("mounts %d\n", lines_of("/proc/self/mounts"));
	printf("files in /run %d\n", entries("/run", "") + entries("/run/ovr", ""));
	snprintf(path, sizeof(path), "/proc/%d/fd", of_agent ? of_agent->pid : 0);
	printf("descriptors of the agent %d\n", entries(path, ""));
	snprintf(path, sizeof(path), "/proc/%d/status", of_agent ? of_agent->pid : 0);
	printf("KiB of the agent %ld\n", field_of(path, "VmRSS:"));
	printf("KiB available %ld\n", field_of("/proc/meminfo", "MemAvailable:"));
	printf("KiB of slabs %ld\n", field_of("/proc/meminfo", "Slab:"));
	for (const char *const *mark = (const char *const[]){"main", "thread", "child", NULL};
	     *mark; mark++) {
		snprintf(path, sizeof(path), DIRECTORY "/%s", *mark);
		printf("mark-%s %d\n", *mark, access(path, F_OK) == 0);
	}
}

static const struct process *victim(const char *name)
{
	const struct process *one = NULL;
	int nth;

	if (!strcmp(name, "agent"))
		return agent();
	if (!strcmp(name, "criu"))
		return criu();
	if (!strcmp(name, "hook"))
		return hook();
	if (!strcmp(name, "root")) {
		for (int i = 0; i < count; i++)
			if (table[i].pid == ROOT && table[i].state != 'Z')
				one = &table[i];
		return one;
	}
	nth = subjects() ? (int)(time(NULL) % subjects()) : -1;
	for (int i = 0; i < count; i++)
		if (table[i].subject && nth-- == 0)
			one = &table[i];
	return one;
}

static int end(void)
{
	static const char *const files[] = {
		"pid",       "main",        "thread",       "child",        "ask-main",
		"ask-child", "answer-main", "answer-child", ".answer-main", ".answer-child",
	};
	char path[64];
	int tries = 0;

	for (;;) {
		read_table();
		int left = 0;

		for (int i = 0; i < count; i++)
			if (table[i].subject) {
				kill(table[i].pid, SIGKILL);
				left++;
			} else if (table[i].pid == ROOT || !strcmp(table[i].name, "ovr-subject")) {
				left++; /* a zombie has no program any more, and its pid still */
			}
		if (!left)
			break;
		if (tries++ == 1000)
			return 1;
		usleep(20000);
	}
	for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
		snprintf(path, sizeof(path), DIRECTORY "/%s", files[i]);
		unlink(path);
	}
	return 0;
}

int main(int argc, char **argv)
{
	const struct process *one;

	if (argc == 1) {
		look();
		return 0;
	}
	if (!strcmp(argv[1], "end"))
		return end();
	if (argc != 3 || strcmp(argv[1], "kill"))
		return 2;
	read_table();
	one = victim(argv[2]);
	if (one && kill(one->pid, SIGKILL) == 0)
		printf("killed %d\n", one->pid);
	return 0;
}
