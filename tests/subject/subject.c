/*
 * The tree that is restored under stress, under fire and a thousand times over.
 *
 *     ovr-subject BYTES [mergeable]
 *
 * A process with a thread and a child. Its memory is of every sort that is written differently:
 * private, inherited by the child and shared with it copy-on-write, and shared memory. All of it
 * has known content (pattern.h).
 *
 * Each of the three tasks sleeps, and marks that it ran whenever it wakes up: it makes the file
 * DIRECTORY/main, /thread or /child. A sleep that CRIU interrupts ends when the task runs again, so
 * that the mark is the first thing that a restored task does; and it does it with registers and its
 * program's file alone, so that a task that is let go with no memory marks it too.
 *
 * When there is a file DIRECTORY/ask-main (ask-child) the process removes it, checks all of its memory,
 * and writes DIRECTORY/answer-main (answer-child): {"pages": N, "wrong": N, "first": "private 17"}.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"

#ifndef MADV_MERGEABLE
#define MADV_MERGEABLE 12
#endif

struct area {
	const char *name;
	uint64_t *start;
	size_t pages;
};

enum { PRIVATE, INHERITED, SHARED, OF_CHILD, AREAS };

static struct area areas[AREAS];
static bool mergeable;

static __attribute__((noreturn)) void die(const char *what)
{
	fprintf(stderr, "ovr-subject: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void make_area(int number, const char *name, size_t bytes, int sharing)
{
	struct area *area = &areas[number];
	void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);

	if (start == MAP_FAILED)
		die("mmap");
	if (mergeable && sharing == MAP_PRIVATE && madvise(start, bytes, MADV_MERGEABLE))
		die("MADV_MERGEABLE");
	*area = (struct area){name, start, bytes / PAGE};
	for (size_t i = 0; i < area->pages; i++)
		fill_page(area->start + i * (PAGE / sizeof(uint64_t)),
			  key_of((uint64_t)number + 1, i, 0, mergeable));
}

static void publish(const char *path, const char *partial, const char *text)
{
	int fd = open(partial, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

	if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text) || close(fd) ||
	    rename(partial, path))
		die(path);
}

static void answer(bool child)
{
	size_t pages = 0, wrong = 0;
	char first[64] = "", text[256];

	for (int number = 0; number < AREAS; number++) {
		const struct area *area = &areas[number];

		if (number == (child ? PRIVATE : OF_CHILD))
			continue;
		pages += area->pages;
		for (size_t i = 0; i < area->pages; i++)
			if (!page_holds(area->start + i * (PAGE / sizeof(uint64_t)),
					key_of((uint64_t)number + 1, i, 0, mergeable)) &&
			    !wrong++)
				snprintf(first, sizeof(first), "%s %zu", area->name, i);
	}
	snprintf(text, sizeof(text), "{\"pages\": %zu, \"wrong\": %zu, \"first\": \"%s\"}\n", pages,
		 wrong, first);
	if (child)
		publish(DIRECTORY "/answer-child", DIRECTORY "/.answer-child", text);
	else
		publish(DIRECTORY "/answer-main", DIRECTORY "/.answer-main", text);
}

/* No function of libc: it would need the stack, and what is written there. */
static inline __attribute__((always_inline)) long call(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c)
			 : "rcx", "r11", "memory");
	return result;
}

static inline __attribute__((always_inline)) void mark(const char *path)
{
	/* Never open: a dump would find it open, and a restore want it where `end` removed it. */
	call(SYS_mknod, (long)path, S_IFREG | 0600, 0);
}

static const struct timespec nap = {0, 20000000};

static inline __attribute__((always_inline, noreturn)) void serve(const char *mark_path,
								  const char *ask_path, bool child)
{
	for (;;) {
		mark(mark_path);
		if (ask_path && !call(SYS_unlink, (long)ask_path, 0, 0))
			answer(child);
		call(SYS_nanosleep, (long)&nap, 0, 0);
	}
}

static void *thread(void *nothing)
{
	(void)nothing;
	serve(DIRECTORY "/thread", NULL, false);
}

static void forget_terminal(void)
{
	int fd = open("/dev/null", O_RDWR);

	if (fd < 0 || dup2(fd, 0) < 0 || dup2(fd, 1) < 0 || dup2(fd, 2) < 0)
		die("/dev/null");
	if (fd > 2)
		close(fd);
	setsid();
}

int main(int argc, char **argv)
{
	size_t bytes = argc > 1 ? strtoull(argv[1], NULL, 0) : 0, part = bytes / 16 / PAGE * PAGE;
	volatile bool *ready;
	pthread_t other;
	char text[32];

	if (!part) {
		fprintf(stderr, "usage: ovr-subject BYTES [mergeable]\n");
		return 2;
	}
	mergeable = argc > 2;
	make_area(INHERITED, "inherited", part, MAP_PRIVATE);
	make_area(SHARED, "shared", part, MAP_SHARED);
	ready = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (ready == MAP_FAILED)
		die("mmap");
	forget_terminal();
	switch (fork()) {
	case -1:
		die("fork");
	case 0:
		make_area(OF_CHILD, "of the child", part, MAP_PRIVATE);
		*ready = true;
		serve(DIRECTORY "/child", DIRECTORY "/ask-child", true);
	default:
		break;
	}
	make_area(PRIVATE, "private", bytes - 3 * part, MAP_PRIVATE);
	if (pthread_create(&other, NULL, thread, NULL))
		die("pthread_create");
	while (!*ready)
		usleep(1000);
	snprintf(text, sizeof(text), "%d\n", getpid());
	publish(DIRECTORY "/pid", DIRECTORY "/.pid", text);
	serve(DIRECTORY "/main", DIRECTORY "/ask-main", false);
}
