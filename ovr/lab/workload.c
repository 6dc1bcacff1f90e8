/*
 * ovr-workload: the process that the demo and the tests dump and restore.
 *
 *     ovr-workload DIR BYTES UMASK
 *
 * Fills BYTES of private anonymous memory with generated words, sets its umask (octal), forgets
 * its terminal and every open file, and writes its pid to DIR/pid. On SIGUSR1 it checks every
 * word and its umask from within and writes one JSON object to DIR/answer:
 *
 *     {"pid": 123, "words": 134217728, "wrong": 0, "first_wrong": -1, "umask": "0137"}
 *
 * The expected words are recomputed, not stored, so that a restore that misses a page cannot pass.
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
#include <unistd.h>

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

static void answer(const char *dir, const uint64_t *words, uint64_t count)
{
	uint64_t wrong = 0;
	long long first = -1;
	char text[256];
	mode_t mask;

	for (uint64_t i = 0; i < count; i++) {
		if (words[i] == word_at(i))
			continue;
		if (!wrong++)
			first = (long long)i;
	}
	mask = umask(0);
	umask(mask);
	snprintf(text, sizeof(text),
		 "{\"pid\": %d, \"words\": %llu, \"wrong\": %llu, \"first_wrong\": %lld, "
		 "\"umask\": \"%04o\"}\n",
		 getpid(), (unsigned long long)count, (unsigned long long)wrong, first,
		 (unsigned int)mask);
	publish(dir, "answer", text);
}

int main(int argc, char **argv)
{
	uint64_t bytes, count;
	uint64_t *words;
	char text[32];
	sigset_t set;
	int fd, signal_number;

	if (argc != 4) {
		fprintf(stderr, "usage: ovr-workload DIR BYTES UMASK\n");
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

	for (;;)
		if (!sigwait(&set, &signal_number))
			answer(argv[1], words, count);
}
