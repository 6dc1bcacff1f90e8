/*
 * large: a family with areas of several huge pages, as a pool in the guest can give them: whole,
 * with small and with large holes, executable, next to each other, and others that it cannot.
 */
#include "../pool/check.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define HUGE (2 * MIB)
#define WORKERS 3

static struct pages whole, holes, code, neighbour, heap, unreserved, inherited, own;

static struct worker {
	pthread_t id;
	unsigned asked, answered;
} workers[WORKERS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int number_of_this; /* 0: root, 1 … 3: its children, 10: a grandchild */

/* Accounted memory, unlike that of pages_new; with a page that nobody may touch at both ends. */
static void area(struct pages *pages, const char *name, size_t size, int prot, size_t off)
{
	char *start = map_anonymous(size + 2 * HUGE, prot, 0);
	char *here = start + HUGE - (uintptr_t)start % HUGE + off;

	check(mprotect(start, here - start, PROT_NONE), "mprotect");
	check(mprotect(here + size, start + size + 2 * HUGE - here - size, PROT_NONE), "mprotect");
	pages_at(pages, name, here, size);
}

static void drop(struct pages *pages, size_t first, size_t count)
{
	check(madvise(pages->start + first * PAGE, count * PAGE, MADV_DONTNEED), "MADV_DONTNEED");
	pages_note(pages, first, count, 0, ZERO);
}

/* Scheduling is by the thread, and CRIU that was started in advance may have had another. */
static void check_scheduling(void)
{
	struct sched_param parameter;

	expect(sched_getscheduler(0) == SCHED_OTHER, "another scheduling policy");
	expect(!sched_getparam(0, &parameter) && !parameter.sched_priority, "a real-time priority");
	errno = 0;
	expect(getpriority(PRIO_PROCESS, 0) == 0 && !errno, "another nice value");
}

static void *run_worker(void *argument)
{
	struct worker *worker = argument;

	pthread_mutex_lock(&lock);
	for (;;) {
		while (worker->asked == worker->answered)
			pthread_cond_wait(&changed, &lock);
		check_scheduling();
		worker->answered = worker->asked;
		pthread_cond_broadcast(&changed);
	}
	return NULL;
}

static void ask_workers(unsigned round)
{
	pthread_mutex_lock(&lock);
	for (int i = 0; i < WORKERS; i++)
		workers[i].asked = round;
	pthread_cond_broadcast(&changed);
	for (int i = 0; i < WORKERS; i++)
		while (workers[i].answered != round)
			pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
}

static void check_own(void)
{
	check_scheduling();
	pages_check(&own);
	pages_check(&inherited);
}

static void serve(unsigned round, unsigned phase)
{
	ask_children(round, phase);
	check_own();
	if (phase == 0)
		return;
	pages_renew(&own, 1 + number_of_this, round);
	pages_renew(&inherited, 1 + number_of_this, round);
	check_own();
}

static void begin(int number)
{
	number_of_this = number;
	area(&own, "own", (2 + number % 3) * HUGE + 3 * PAGE, PROT_READ | PROT_WRITE,
	     number * 17 * PAGE);
	pages_write(&own, 0, own.count, 1 + number, FIRST);
	if (number == 2)
		start_child(10, begin, serve);
	pages_target(&own);
}

static void make_root(void)
{
	const int rw = PROT_READ | PROT_WRITE;
	char *start;

	area(&whole, "whole", 8 * HUGE + 5 * PAGE, rw, 7 * PAGE);
	pages_write(&whole, 0, whole.count, 1, FIRST);
	area(&holes, "holes", 9 * HUGE, rw, 0);
	pages_write(&holes, 0, holes.count, 1, FIRST);
	drop(&holes, 700, 1);
	drop(&holes, 2 * HUGE / PAGE, HUGE / PAGE + 40);
	area(&code, "code", 2 * HUGE, rw | PROT_EXEC, 0);
	pages_write(&code, 0, code.count, 1, FIRST);
	/* Right behind it: not the same area, since it may not run. */
	pages_at(&neighbour, "neighbour", code.start + 2 * HUGE, 4 * PAGE);
	check(mprotect(neighbour.start, 4 * PAGE, rw), "mprotect");
	pages_write(&neighbour, 0, 4, 1, FIRST);
	pages_new(&unreserved, "unreserved", 2 * HUGE);
	pages_write(&unreserved, 0, unreserved.count, 1, FIRST);
	start = sbrk(0);
	start += (PAGE - (uintptr_t)start % PAGE) % PAGE;
	check(brk(start + 3 * HUGE), "brk");
	pages_at(&heap, "heap", start, 3 * HUGE);
	pages_write(&heap, 0, heap.count, 1, FIRST);
}

static void check_root(void)
{
	pages_check(&whole);
	pages_check(&holes);
	pages_check(&code);
	pages_check(&neighbour);
	pages_check(&unreserved);
	pages_check(&heap);
}

void set_up(void)
{
	area(&inherited, "inherited", 2 * HUGE, PROT_READ | PROT_WRITE, 0);
	pages_write(&inherited, 0, inherited.count, 1, FIRST);
	/* First the children: what the root has for itself it gets later. */
	for (int number = 1; number <= 3; number++)
		start_child(number, begin, serve);
	begin(0);
	make_root();
	for (int i = 0; i < WORKERS; i++) {
		errno = pthread_create(&workers[i].id, NULL, run_worker, &workers[i]);
		if (errno)
			die("pthread_create");
	}
	pages_target(&whole);
	pages_target(&holes);
}

static void renew_root(unsigned round)
{
	pages_renew(&whole, 1, round);
	pages_renew(&holes, 1, round);
	pages_renew(&heap, 1, round);
	pages_write(&holes, 700 + round % 40, 2, 1, generation_of(round));
}

void answer(unsigned round)
{
	serve(round, 0);
	check_root();
	if (!all_right())
		return;
	serve(round, 1);
	ask_workers(round);
	renew_root(round);
	check_root();
}
