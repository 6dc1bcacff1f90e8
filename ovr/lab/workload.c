/*
 * ovr-workload: the process that the demo and the tests dump and restore.
 *
 *     ovr-workload DIR BYTES UMASK [RATE]
 *
 * Fills BYTES of private anonymous memory with generated words, sets its umask (octal), forgets
 * its terminal and every open file, and writes its pid to DIR/pid. On SIGUSR1 it checks every
 * word and its umask from within and writes one JSON object to DIR/answer:
 *
 *     {"pid": 123, "words": 134217728, "wrong": 0, "first_wrong": -1, "umask": "0137"}
 *
 * The expected words are recomputed, not stored, so that a restore that misses a page cannot pass.
 *
 * With RATE it also writes to so many MiB of pages in a second, one after the other and again from
 * the first: the number of the pass goes into each page. The answer then has the longest time in
 * which it did not run since the last answer: seconds of its clock before and after.
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
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE_WORDS 512
#define STEPS 1000 /* in a second */

/* With RATE: the memory, and what was written to it. */
static struct {
	uint64_t *words;
	uint64_t pages, per_step, written; /* pages; since the start */
	double last, gap, before, after;   /* of the clock, in seconds */
} state;

static void die(const char *what)
{
	fprintf(stderr, "ovr-workload: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* splitmix64, the finalizer: every word depends on every bit of its index. */
static uint64_t word_at(uint64_t index)
{
	uint64_t z = (index + 1) * 0x9e3779b97f4a7c15ULL;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

/* Write a file atomically: a process that polls for it never reads a part of it. */
static void publish(const char *dir, const char *name, const char *text)
{
	char path[4096], partial[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	snprintf(partial, sizeof(partial), "%s/.%s", dir, name);
	fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		die(partial);
	if (write(fd, text, strlen(text)) != (ssize_t)strlen(text) || close(fd))
		die(partial);
	/* The umask is under test: the file's mode must not depend on it. */
	if (chmod(partial, 0644) || rename(partial, path))
		die(path);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_REALTIME, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* How often a page was written to: the first word of it was changed by that number. */
static uint64_t passes(uint64_t page)
{
	return state.pages ? (state.written + state.pages - 1 - page) / state.pages : 0;
}

static void step(void)
{
	double time = now();

	if (state.last && time - state.last > state.gap) {
		state.gap = time - state.last;
		state.before = state.last;
		state.after = time;
	}
	state.last = time;
	for (uint64_t i = 0; state.pages && i < state.per_step; i++) {
		uint64_t page = state.written++ % state.pages;

		state.words[page * PAGE_WORDS] = word_at(page * PAGE_WORDS) ^ passes(page);
	}
}

static uint64_t expected(uint64_t index)
{
	return word_at(index) ^ (index % PAGE_WORDS ? 0 : passes(index / PAGE_WORDS));
}

static void answer(const char *dir, const uint64_t *words, uint64_t count)
{
	uint64_t wrong = 0;
	long long first = -1;
	char text[512];
	mode_t mask;

	for (uint64_t i = 0; i < count; i++) {
		if (words[i] == expected(i))
			continue;
		if (!wrong++)
			first = (long long)i;
	}
	mask = umask(0);
	umask(mask);
	snprintf(text, sizeof(text),
		 "{\"pid\": %d, \"words\": %llu, \"wrong\": %llu, \"first_wrong\": %lld, "
		 "\"umask\": \"%04o\", \"written\": %llu, \"before\": %.6f, \"after\": %.6f}\n",
		 getpid(), (unsigned long long)count, (unsigned long long)wrong, first,
		 (unsigned int)mask, (unsigned long long)state.written, state.before, state.after);
	state.last = state.gap = 0;
	publish(dir, "answer", text);
}

int main(int argc, char **argv)
{
	const struct timespec pause = {0, 1000000000 / STEPS};
	uint64_t bytes, count;
	uint64_t *words;
	char text[32];
	sigset_t set;
	int fd, signal_number;

	if (argc != 4 && argc != 5) {
		fprintf(stderr, "usage: ovr-workload DIR BYTES UMASK [RATE]\n");
		return 2;
	}
	bytes = strtoull(argv[2], NULL, 0);
	count = bytes / sizeof(*words);
	words = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (words == MAP_FAILED)
		die("mmap");
	for (uint64_t i = 0; i < count; i++)
		words[i] = word_at(i);
	umask((mode_t)strtoul(argv[3], NULL, 8));

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	setsid();
	snprintf(text, sizeof(text), "%d\n", getpid());
	publish(argv[1], "pid", text);
	fd = open("/dev/null", O_RDWR);
	if (fd < 0 || dup2(fd, 0) < 0 || dup2(fd, 1) < 0 || dup2(fd, 2) < 0)
		die("/dev/null");
	if (fd > 2)
		close(fd);

	if (argc == 5) {
		state.words = words;
		state.pages = count / PAGE_WORDS;
		state.per_step = (strtoull(argv[4], NULL, 0) * 256 + STEPS - 1) / STEPS;
	}
	for (;;) {
		if (argc == 4 ? !sigwait(&set, &signal_number) :
				sigtimedwait(&set, NULL, &pause) > 0)
			answer(argv[1], words, count);
		if (argc == 5)
			step();
	}
}
