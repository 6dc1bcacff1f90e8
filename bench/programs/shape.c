/*
 * bench-shape: a process, or a tree of processes, whose memory has a certain shape.
 *
 *     bench-shape DIR areas BYTES COUNT	one process, its memory in COUNT areas
 *     bench-shape DIR tree BYTES COUNT		COUNT processes, BYTES for all of them together
 *
 * Every word depends on its address and on who has it. The root writes its pid to DIR/ready when
 * all memory is filled. On SIGUSR1 every process checks its own memory; the root has its children
 * do so first, and then writes how many words of all processes are wrong to DIR/answer.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ull
#define MAX_CHILDREN 1000

static uint64_t *areas[65536];
static uint64_t area_count, area_words;
static pid_t children[MAX_CHILDREN];
static int child_count;
static char directory[200];

static void die(const char *what)
{
	fprintf(stderr, "bench-shape: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t word(const uint64_t *at, uint64_t who)
{
	uint64_t z = ((uint64_t)(uintptr_t)at ^ who << 48) * 0x9e3779b97f4a7c15ull;

	return z ^ (z >> 29);
}

static void allocate(uint64_t bytes, uint64_t count, uint64_t who)
{
	uint64_t size = bytes / count / PAGE * PAGE;
	/* A PROT_NONE page keeps neighbours from being joined. */
	char *place = mmap(NULL, (size + PAGE) * count, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (!size || count > sizeof(areas) / sizeof(*areas) || place == MAP_FAILED)
		die("areas");
	munmap(place, (size + PAGE) * count);
	area_count = count;
	area_words = size / sizeof(uint64_t);
	for (uint64_t i = 0; i < count; i++) {
		areas[i] = mmap(place + i * (size + PAGE), size, PROT_READ | PROT_WRITE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		if (areas[i] == MAP_FAILED)
			die("mmap");
		for (uint64_t j = 0; j < area_words; j++)
			areas[i][j] = word(&areas[i][j], who);
	}
}

static void publish(const char *name, long long number)
{
	char path[300], partial[300], text[32];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	snprintf(partial, sizeof(partial), "%s/.%s", directory, name);
	snprintf(text, sizeof(text), "%lld\n", number);
	fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, text, strlen(text)) < 0 || close(fd) || rename(partial, path))
		die(path);
}

/* A child's number of wrong words; it is waited for as long as it takes. */
static long long answer_of(int child)
{
	char path[300];
	long long wrong = -1;
	FILE *file;

	kill(children[child], SIGUSR1);
	snprintf(path, sizeof(path), "%s/answer.%d", directory, child + 1);
	while (!(file = fopen(path, "r")))
		usleep(10000);
	if (fscanf(file, "%lld", &wrong) != 1)
		wrong = -1;
	fclose(file);
	unlink(path);
	return wrong;
}

static void serve(uint64_t who)
{
	char name[32] = "answer";
	long long wrong;
	sigset_t set;
	int number;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	if (who)
		snprintf(name, sizeof(name), "answer.%llu", (unsigned long long)who);
	while (!sigwait(&set, &number)) {
		wrong = 0;
		for (int i = 0; !who && i < child_count; i++)
			wrong += answer_of(i);
		for (uint64_t i = 0; i < area_count; i++)
			for (uint64_t j = 0; j < area_words; j++)
				wrong += areas[i][j] != word(&areas[i][j], who);
		publish(name, wrong);
	}
}

static void grow_tree(uint64_t bytes, int count)
{
	int ready[2];
	char byte = 0;

	if (count > MAX_CHILDREN || pipe(ready) < 0)
		die("tree");
	for (child_count = 0; child_count < count - 1; child_count++) {
		children[child_count] = fork();
		if (children[child_count] < 0)
			die("fork");
		if (children[child_count] == 0) {
			int who = child_count + 1;

			child_count = 0;
			allocate(bytes / (uint64_t)count, 1, (uint64_t)who);
			if (write(ready[1], &byte, 1) != 1)
				die("pipe");
			close(ready[0]), close(ready[1]);
			serve((uint64_t)who);
		}
	}
	for (int i = 0; i < child_count; i++)
		if (read(ready[0], &byte, 1) != 1)
			die("pipe");
	close(ready[0]), close(ready[1]);
	allocate(bytes / (uint64_t)count, 1, 0);
}

int main(int argc, char **argv)
{
	uint64_t bytes, count;
	sigset_t set;

	if (argc != 5) {
		fprintf(stderr, "usage: bench-shape DIR areas|tree BYTES COUNT\n");
		return 2;
	}
	snprintf(directory, sizeof(directory), "%s", argv[1]);
	bytes = strtoull(argv[3], NULL, 0);
	count = strtoull(argv[4], NULL, 0);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	setsid();
	if (!strcmp(argv[2], "tree"))
		grow_tree(bytes, (int)count);
	else
		allocate(bytes, count, 0);
	publish("ready", getpid());
	serve(0);
	return 1;
}
