/*
 * Have the kernel write a task's memory to swap, or read that memory as another process would.
 *
 *     ovr-swap out PID...     write all of its anonymous and shared memory to swap (MADV_PAGEOUT)
 *     ovr-swap read PID...    read a byte of each of its pages by way of /proc/PID/mem
 *     ovr-swap squeeze        both, in turn, to every task that is held by a tracer
 *     ovr-swap chase          the same for ever
 *
 * A page that is read back from swap is clean and keeps its copy there: whoever changes it without
 * the kernel's knowledge loses the change when memory is reclaimed.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "held.h"

#define PAGE 4096ul
#define MAX_AREAS 512
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

struct area {
	unsigned long start, end;
};

/* The writable areas, without those that the kernel maps itself. */
static int areas_of(pid_t pid, struct area areas[MAX_AREAS])
{
	char path[64], line[512], access[8];
	int count = 0;
	FILE *maps;

	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	maps = fopen(path, "re");
	while (maps && count < MAX_AREAS && fgets(line, sizeof(line), maps)) {
		struct area *here = &areas[count];

		if (sscanf(line, "%lx-%lx %7s", &here->start, &here->end, access) == 3 &&
		    access[1] == 'w' && !strstr(line, "[v"))
			count++;
	}
	if (maps)
		fclose(maps);
	return count;
}

static void page_out(pid_t pid)
{
	struct area areas[MAX_AREAS];
	int pidfd = (int)syscall(SYS_pidfd_open, pid, 0), count = areas_of(pid, areas);

	for (int i = 0; i < count; i++) {
		struct iovec range = {(void *)areas[i].start, areas[i].end - areas[i].start};

		syscall(SYS_process_madvise, pidfd, &range, 1, MADV_PAGEOUT, 0);
	}
	if (pidfd >= 0)
		close(pidfd);
}

static unsigned long read_all(pid_t pid)
{
	struct area areas[MAX_AREAS];
	unsigned long pages = 0;
	char path[64], byte;
	int mem, count = areas_of(pid, areas);

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	mem = open(path, O_RDONLY | O_CLOEXEC);
	for (int i = 0; i < count; i++)
		for (unsigned long at = areas[i].start; at < areas[i].end; at += PAGE)
			pages += pread(mem, &byte, 1, (off_t)at) == 1;
	if (mem >= 0)
		close(mem);
	return pages;
}

static unsigned long squeeze(void)
{
	unsigned long pages = 0;
	DIR *proc = opendir("/proc");
	struct dirent *entry;

	while (proc && (entry = readdir(proc))) {
		pid_t pid = atoi(entry->d_name);

		if (pid > 0 && held(pid)) {
			page_out(pid);
			pages += read_all(pid);
		}
	}
	if (proc)
		closedir(proc);
	return pages;
}

static void chase(void)
{
	struct timespec nap = {0, 10000000};

	/* It must not be late: a tree is held for seconds at most. */
	setpriority(PRIO_PROCESS, 0, 0);
	for (;;) {
		squeeze();
		nanosleep(&nap, NULL);
	}
}

int main(int argc, char **argv)
{
	unsigned long pages = 0;

	if (argc == 2 && !strcmp(argv[1], "chase"))
		chase();
	if (argc == 2 && !strcmp(argv[1], "squeeze"))
		pages = squeeze();
	for (int i = 2; i < argc; i++) {
		if (!strcmp(argv[1], "out"))
			page_out(atoi(argv[i]));
		else
			pages += read_all(atoi(argv[i]));
	}
	printf("%lu\n", pages);
	return argc < 2;
}
