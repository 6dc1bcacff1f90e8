/*
 * shape: much of one thing. The kind is an argument: threads, processes, areas, descriptors,
 * reserved or high; with `some` there is a fifth of it, with `few` a hundredth.
 */
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#define THREADS 10000
#define FAMILIES 10
#define CHILDREN_EACH 59 /* 600 processes, and the root */
#define AREAS 60000
#define DESCRIPTORS 20000
#define RESERVED (400UL << 30)
#define HIGH (1UL << 48)

static struct pages pages;

static size_t many(size_t count)
{
	size_t part = 1;

	if (has_argument("few"))
		part = 100;
	else if (has_argument("some"))
		part = 5;
	return (count + part - 1) / part;
}

/* --- threads --- */

static __thread unsigned own_rounds;

static struct thread {
	pthread_t id;
	sem_t asked;
	unsigned rounds;
} *threads;
static sem_t answered;

static void *run_thread(void *argument)
{
	struct thread *self = argument;

	for (;;) {
		while (sem_wait(&self->asked) && errno == EINTR)
			;
		expect(own_rounds == self->rounds, "a thread has lost its storage");
		expect(pthread_equal(pthread_self(), self->id), "a thread is another one");
		self->rounds = ++own_rounds;
		sem_post(&answered);
	}
	return NULL;
}

static void make_threads(void)
{
	pthread_attr_t attributes;

	threads = calloc(many(THREADS), sizeof(*threads));
	if (!threads || sem_init(&answered, 0, 0) || pthread_attr_init(&attributes) ||
	    pthread_attr_setstacksize(&attributes, 64 << 10))
		die("threads");
	for (size_t i = 0; i < many(THREADS); i++) {
		sem_init(&threads[i].asked, 0, 0);
		errno = pthread_create(&threads[i].id, &attributes, run_thread, &threads[i]);
		if (errno)
			die("pthread_create");
	}
}

static void ask_threads(void)
{
	for (size_t i = 0; i < many(THREADS); i++)
		sem_post(&threads[i].asked);
	for (size_t i = 0; i < many(THREADS); i++)
		while (sem_wait(&answered) && errno == EINTR)
			;
}

/* --- processes --- */

static int number;

static void serve(unsigned round, unsigned phase)
{
	(void)phase;
	ask_children(round, phase);
	pages_check(&pages);
	pages_renew(&pages, (uint32_t)number, round);
	pages_check(&pages);
}

static void become(int new_number)
{
	number = new_number;
	pages_new(&pages, "own", 4 * PAGE);
	pages_write_every(&pages, 0, 2, (uint32_t)number, FIRST);
	for (int i = 1; number % 100 == 0 && i <= CHILDREN_EACH; i++)
		start_child(number + i, become, serve);
}

/* --- areas: neighbours differ in protection, so that none merge --- */

static void make_areas(void)
{
	pages_new(&pages, "areas", many(AREAS) * PAGE);
	pages_write(&pages, 0, pages.count, 1, FIRST);
	for (size_t i = 0; i < pages.count; i += 2)
		check(mprotect(pages.start + i * PAGE, PAGE, PROT_READ), "mprotect");
}

/* --- descriptors: of one file, each with a position of its own, and eventfds --- */

static int first_descriptor;

static void make_descriptors(void)
{
	struct rlimit limit = {DESCRIPTORS + 100, DESCRIPTORS + 100};

	check(setrlimit(RLIMIT_NOFILE, &limit), "setrlimit");
	make_file("data", 16);
	for (size_t i = 0; i < many(DESCRIPTORS); i++) {
		int fd = i % 2 ? eventfd((unsigned)i, EFD_NONBLOCK) : open_file("data", O_RDONLY);

		check(fd, "open");
		if (!i)
			first_descriptor = fd;
		if (fd != first_descriptor + (int)i)
			die("descriptors are not in order");
		if (i % 2 == 0)
			check(lseek(fd, (off_t)i, SEEK_SET), "lseek");
	}
}

static void check_descriptors(void)
{
	for (size_t i = 0; i < many(DESCRIPTORS); i++) {
		int fd = first_descriptor + (int)i;
		uint64_t count = 0;

		if (i % 2 == 0) {
			expect(lseek(fd, 0, SEEK_CUR) == (off_t)i, "descriptor %d is elsewhere",
			       fd);
			continue;
		}
		expect(read(fd, &count, sizeof(count)) == sizeof(count) && count == i,
		       "eventfd %d has %llu", fd, (unsigned long long)count);
		count = i;
		expect(write(fd, &count, sizeof(count)) == sizeof(count), "eventfd %d is full", fd);
	}
}

/* --- address space --- */

static char *reserved;

static void reserve(void)
{
	size_t size = many(RESERVED) / PAGE * PAGE;

	reserved = map_anonymous(size, PROT_READ | PROT_WRITE, MAP_NORESERVE);
	/* In the middle, and both ends. */
	pages_at(&pages, "in a reservation", reserved + size / 2, 2 * MIB);
	pages_write_every(&pages, 0, 3, 1, FIRST);
	reserved[0] = 'a';
	reserved[size - 1] = 'z';
}

static void check_reservation(void)
{
	size_t size = many(RESERVED) / PAGE * PAGE;

	expect(reserved[0] == 'a' && reserved[size - 1] == 'z',
	       "an end of the reservation is lost");
	expect(reserved[size / 4] == 0, "there is something in the reservation");
}

static void map_high(void)
{
	char *start = mmap((void *)HIGH, 64 * MIB, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (start == MAP_FAILED || (uintptr_t)start < HIGH)
		die("no memory above 47 bits: has the CPU 5 levels of page tables?");
	pages_at(&pages, "high", start, 64 * MIB);
	pages_write_every(&pages, 0, 2, 1, FIRST);
}

/* --- */

void set_up(void)
{
	if (has_argument("threads"))
		make_threads();
	else if (has_argument("processes"))
		for (int family = 1; (size_t)family <= many(FAMILIES); family++)
			start_child(100 * family, become, serve);
	else if (has_argument("areas"))
		make_areas();
	else if (has_argument("descriptors"))
		make_descriptors();
	else if (has_argument("reserved"))
		reserve();
	else if (has_argument("high"))
		map_high();
	else
		die("which kind?");
}

void answer(unsigned round)
{
	if (threads)
		ask_threads();
	ask_children(round, 0);
	if (first_descriptor)
		check_descriptors();
	if (reserved)
		check_reservation();
	if (pages.count && !has_argument("areas")) {
		pages_check(&pages);
		pages_renew(&pages, 1, round);
	}
	if (pages.count)
		pages_check(&pages);
	expect(true, "nothing");
}
