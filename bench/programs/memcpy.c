/*
 * The memcpy limit: a list of pieces copied by so many threads, and nothing else.
 *
 * A shared library for bench/memcpy.py. It knows nothing of guests, page tables or images.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define MAX_THREADS 64
#define TAKE 64 /* pieces that a thread takes at a time */

struct piece {
	char *to;
	const char *from;
	uint64_t size;
};

struct job {
	const struct piece *pieces;
	uint64_t count;
	_Atomic uint64_t next;
};

static void *work(void *argument)
{
	struct job *job = argument;
	uint64_t at, end;

	while ((at = atomic_fetch_add(&job->next, TAKE)) < job->count) {
		end = at + TAKE < job->count ? at + TAKE : job->count;
		for (; at < end; at++)
			memcpy(job->pieces[at].to, job->pieces[at].from, job->pieces[at].size);
	}
	return NULL;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Seconds, or -1: too many threads. */
double copy_pieces(const struct piece *pieces, uint64_t count, int threads)
{
	struct job job = {.pieces = pieces, .count = count};
	pthread_t thread[MAX_THREADS];
	double start = now();
	int started = 0;

	if (threads > MAX_THREADS)
		return -1;
	while (started < threads - 1 && !pthread_create(&thread[started], NULL, work, &job))
		started++;
	work(&job);
	for (int i = 0; i < started; i++)
		pthread_join(thread[i], NULL);
	return started == threads - 1 ? now() - start : -1;
}
