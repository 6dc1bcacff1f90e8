/*
 * Load of a busy and hostile guest on its memory while a tree is restored into it.
 *
 *     ovr-noise CGROUP CANARIES MIB
 *
 * Runs until it is killed, as these processes:
 *
 * - canaries: CANARIES processes with MIB of known content each, always checked, sometimes given back
 *   to the kernel and written anew. NOISE/canary-N says how often all of it was checked, and how many
 *   pages were wrong;
 * - compaction of all memory, and reclaim of the memory of CGROUP, again and again;
 * - storms of forks, and memory that comes and goes;
 * - a mover, which does to held tasks, by their pid, what the kernel may do at any moment: moves their
 *   pages to another NUMA node, writes them to swap, collapses them into huge pages. NOISE/moved
 *   says how often.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "held.h"
#include "pattern.h"

#define NOISE "/run/ovr-noise"
#define WORDS (PAGE / sizeof(uint64_t))
#define BLOCK (4 * MIB / PAGE) /* pages between two naps */
#define STORM 16
#define MAX_RANGES 64

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef PR_SET_MEMORY_MERGE
#define PR_SET_MEMORY_MERGE 67
#endif

static __attribute__((noreturn)) void die(const char *what)
{
	fprintf(stderr, "ovr-noise: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void nap(long milliseconds)
{
	struct timespec time = {milliseconds / 1000, milliseconds % 1000 * 1000000};

	nanosleep(&time, NULL);
}

static unsigned long chance(void)
{
	static uint64_t state;

	if (!state)
		state = mix((uint64_t)getpid() << 20);
	return (unsigned long)(mix(state += 0x9e3779b97f4a7c15ULL) >> 16);
}

static void *map(size_t bytes)
{
	void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (start == MAP_FAILED)
		die("mmap");
	return start;
}

static void say(const char *path, const char *text)
{
	char partial[128];
	int fd;

	snprintf(partial, sizeof(partial), "%s.new", path);
	fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, text, strlen(text)) < 0 || close(fd) || rename(partial, path))
		die(path);
}

/* True when the kernel took it. */
static bool order(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	bool done = fd >= 0 && write(fd, text, strlen(text)) >= 0;

	if (fd >= 0)
		close(fd);
	return done;
}

/* ------------------------------------------------------------------------ canaries */

static void write_block(uint64_t *start, size_t first, size_t count, uint64_t whose, uint64_t turn)
{
	for (size_t i = first; i < first + count; i++)
		fill_page(start + i * WORDS, key_of(whose, i, turn, true));
}

static size_t wrong_in(const uint64_t *start, size_t first, size_t count, uint64_t whose,
		       uint64_t turn)
{
	size_t wrong = 0;

	for (size_t i = first; i < first + count; i++)
		wrong += !page_holds(start + i * WORDS, key_of(whose, i, turn, true));
	return wrong;
}

static __attribute__((noreturn)) void canary(unsigned number, size_t mib)
{
	size_t pages = mib * MIB / PAGE, blocks = pages / BLOCK, wrong = 0, found;
	uint64_t *start = map(pages * PAGE), *turns = calloc(blocks, sizeof(*turns));
	char path[64], text[64];

	snprintf(path, sizeof(path), NOISE "/canary-%u", number);
	for (size_t block = 0; block < blocks; block++)
		write_block(start, block * BLOCK, BLOCK, 1000 + number, 0);
	for (unsigned long pass = 0;; pass++) {
		snprintf(text, sizeof(text), "%lu %zu\n", pass, wrong);
		say(path, text);
		for (size_t block = 0; block < blocks; block++) {
			uint64_t *here = start + block * BLOCK * WORDS;

			found = wrong_in(start, block * BLOCK, BLOCK, 1000 + number, turns[block]);
			wrong += found;
			if (found || chance() % 8 == 0) {
				madvise(here, BLOCK * PAGE, MADV_DONTNEED);
				write_block(start, block * BLOCK, BLOCK, 1000 + number,
					    ++turns[block]);
			}
			nap(5);
		}
	}
}

/* ------------------------------------------------------------------------ what comes and goes */

static __attribute__((noreturn)) void fork_storm(void)
{
	size_t pages = 2 * MIB / PAGE;
	uint64_t *start = map(pages * PAGE);

	write_block(start, 0, pages, 1, 0);
	for (;;) {
		for (int i = 0; i < STORM; i++)
			if (fork() == 0) {
				write_block(start, chance() % pages / 2, pages / 8, 2, 0);
				_exit(0);
			}
		while (wait(NULL) > 0)
			;
		nap(20);
	}
}

static __attribute__((noreturn)) void churn(void)
{
	for (;;) {
		size_t bytes = (1 + chance() % 24) * MIB;
		char *start = map(bytes);

		for (size_t at = 0; at < bytes; at += PAGE)
			start[at] = 1;
		nap((long)(chance() % 20));
		munmap(start, bytes);
	}
}

static __attribute__((noreturn)) void compaction(void)
{
	for (;;) {
		order("/proc/sys/vm/compact_memory", "1");
		nap(50);
	}
}

static __attribute__((noreturn)) void reclaim(const char *cgroup)
{
	char path[128];

	snprintf(path, sizeof(path), "/sys/fs/cgroup/%s/memory.reclaim", cgroup);
	for (;;) {
		order(path, "16M"); /* it may find less than that: EAGAIN */
		nap(100);
	}
}

/* ------------------------------------------------------------------------ the mover */

static struct {
	unsigned long rounds, migrated, paged_out, collapsed;
} moved;

/* Writable areas with some memory in them; a few chosen by chance, and pieces of these. */
static int ranges_of(pid_t pid, struct iovec ranges[MAX_RANGES])
{
	char path[64], line[512], access[8];
	unsigned long start, end;
	int count = 0;
	FILE *maps;

	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	maps = fopen(path, "re");
	while (maps && count < MAX_RANGES && fgets(line, sizeof(line), maps)) {
		if (sscanf(line, "%lx-%lx %7s", &start, &end, access) != 3 || access[1] != 'w' ||
		    strstr(line, "[v"))
			continue;
		if (end - start > 8 * MIB) {
			start += chance() % ((end - start) / (4 * MIB)) * 4 * MIB;
			end = start + 4 * MIB;
		}
		ranges[count++] = (struct iovec){(void *)start, end - start};
	}
	if (maps)
		fclose(maps);
	return count;
}

static void advise(pid_t pid, int advice, unsigned long *count)
{
	struct iovec ranges[MAX_RANGES];
	int pidfd = (int)syscall(SYS_pidfd_open, pid, 0), found = ranges_of(pid, ranges);

	for (int i = 0; i < found; i++)
		*count += syscall(SYS_process_madvise, pidfd, &ranges[i], 1, advice, 0) > 0;
	close(pidfd);
}

static void move(pid_t pid)
{
	unsigned long from = 1ul << (moved.rounds & 1), to = 3 ^ from;

	switch (chance() % 4) {
	case 0:
		advise(pid, MADV_PAGEOUT, &moved.paged_out);
		break;
	case 1:
		advise(pid, MADV_COLLAPSE, &moved.collapsed);
		break;
	default:
		moved.migrated +=
			syscall(SYS_migrate_pages, pid, 8 * sizeof(from), &from, &to) >= 0;
	}
	moved.rounds++;
}

static __attribute__((noreturn)) void mover(void)
{
	char text[128];

	/* It must not be late: a tree is held for seconds at most. */
	setpriority(PRIO_PROCESS, 0, 0);
	for (;;) {
		DIR *proc = opendir("/proc");
		struct dirent *entry;

		while (proc && (entry = readdir(proc))) {
			pid_t pid = atoi(entry->d_name);

			for (int i = 0; i < 5 && pid > 0 && held(pid); i++) {
				move(pid);
				nap(30);
			}
		}
		if (proc)
			closedir(proc);
		snprintf(text, sizeof(text), "%lu %lu %lu\n", moved.migrated, moved.paged_out,
			 moved.collapsed);
		say(NOISE "/moved", text);
		nap(20);
	}
}

/* ------------------------------------------------------------------------ all of them */

static bool is_child(void)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	if (pid == 0)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid == 0;
}

int main(int argc, char **argv)
{
	if (argc != 4) {
		fprintf(stderr, "usage: ovr-noise CGROUP CANARIES MIB\n");
		return 2;
	}
	setsid();
	/* Where the kernel is too old for it (before v6.4) canaries are not merged. */
	if (prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) && errno != EINVAL)
		die("PR_SET_MEMORY_MERGE");
	/* The restore should get a turn now and then. */
	setpriority(PRIO_PROCESS, 0, 10);
	for (int i = 0; i < atoi(argv[2]); i++)
		if (is_child())
			canary((unsigned)i, strtoul(argv[3], NULL, 10));
	if (is_child())
		fork_storm();
	if (is_child())
		churn();
	if (is_child())
		compaction();
	if (is_child())
		reclaim(argv[1]);
	if (is_child())
		mover();
	wait(NULL);
	die("a part of the noise has ended");
}
