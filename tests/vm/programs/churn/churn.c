/*
 * A process that changes its memory all the time, in all ways in which pages are written, moved,
 * lost and shared, by a schedule that its seed makes: for dumps that copy pages while it runs.
 *
 *	churn SEED DIRECTORY
 *
 * Each page is zero or has words that follow from its version; the ledger has the version that the
 * page must have, and says whether a thread is writing it. On SIGUSR1 it checks all of its pages and
 * writes "PAGES WRONG STEPS" to DIRECTORY/answer. It leaves its pid in DIRECTORY/pid.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define WORDS (PAGE / 8)
#define PAGES 2048ul /* of a region: 8 MiB */
#define REGION (PAGES * PAGE)
#define HUGE_PAGE (2ul << 20)
#define REGIONS 8
#define QUIET 7 /* the region of which little is written, so that there are pages to keep */
#define CHILDREN 3
#define COLLAPSE 25 /* MADV_COLLAPSE, since v6.1 */
#define PAGEOUT 21  /* MADV_PAGEOUT, since v5.4 */

struct entry {
	uint32_t version; /* 0: the page is zero */
	uint32_t busy;
};

static struct region {
	char *at;
	struct entry *ledger;
	int protection;
} regions[REGIONS];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static volatile sig_atomic_t asked;
static uint64_t random_state;
static uint64_t steps;
static int children;
static const char *directory;

static uint64_t chance(uint64_t below)
{
	/* xorshift64* (Vigna, 2016) */
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return random_state * 0x2545f4914f6cdd1dull % below;
}

static uint64_t word(int region, uint64_t page, uint32_t version, uint64_t i)
{
	uint64_t x = ((uint64_t)region << 48) ^ (page << 24) ^ version;

	x = (x + i) * 0x9e3779b97f4a7c15ull;
	return version ? x ^ (x >> 29) : 0;
}

static void write_page(int region, uint64_t page)
{
	struct entry *entry = &regions[region].ledger[page];
	volatile uint64_t *words = (uint64_t *)(regions[region].at + page * PAGE);

	if (!(regions[region].protection & PROT_WRITE))
		return;
	entry->busy = 1;
	atomic_signal_fence(memory_order_seq_cst);
	entry->version++;
	for (uint64_t i = 0; i < WORDS; i++)
		words[i] = word(region, page, entry->version, i);
	atomic_signal_fence(memory_order_seq_cst);
	entry->busy = 0;
}

static char *fresh(void)
{
	char *at = mmap(NULL, 2 * REGION, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			-1, 0);

	return at == MAP_FAILED ? NULL : (char *)(((uintptr_t)at + HUGE_PAGE) & ~(HUGE_PAGE - 1));
}

/* Move a region to another address; the room it has there came from fresh(). */
static void move(int region)
{
	char *to = fresh();

	if (to &&
	    mremap(regions[region].at, REGION, REGION, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to)
		regions[region].at = to;
}

/* Two regions change places: what was at one address is at the other. */
static void exchange(int one, int other)
{
	char *here = regions[one].at, *there = regions[other].at, *between = fresh();

	if (one == other || !between ||
	    mremap(here, REGION, REGION, MREMAP_MAYMOVE | MREMAP_FIXED, between) != between)
		return;
	mremap(there, REGION, REGION, MREMAP_MAYMOVE | MREMAP_FIXED, here);
	mremap(between, REGION, REGION, MREMAP_MAYMOVE | MREMAP_FIXED, there);
	regions[one].at = there;
	regions[other].at = here;
}

static void drop(int region, uint64_t page, uint64_t count)
{
	struct entry *ledger = regions[region].ledger;

	for (uint64_t i = page; i < page + count; i++)
		ledger[i].busy = 1;
	madvise(regions[region].at + page * PAGE, count * PAGE, MADV_DONTNEED);
	for (uint64_t i = page; i < page + count; i++)
		ledger[i] = (struct entry){0, 0};
}

static void protect(int region)
{
	regions[region].protection ^= PROT_WRITE;
	mprotect(regions[region].at, REGION, regions[region].protection);
}

/* A child shares all pages, and writes to some, as its parent does. */
static void spawn(void)
{
	int status;

	while (children && waitpid(-1, &status, WNOHANG) > 0)
		children--;
	if (children >= CHILDREN)
		return;
	switch (fork()) {
	case -1:
		return;
	case 0:
		for (int round = 0; round < 40; round++) {
			for (int i = 0; i < 50; i++)
				write_page((int)chance(REGIONS), chance(PAGES));
			usleep(20000);
		}
		_exit(0);
	default:
		children++;
	}
}

static void step(void)
{
	int region = (int)chance(QUIET);
	uint64_t page = chance(PAGES), count = 1 + chance(PAGES - page);
	char *at = regions[region].at + page * PAGE;

	steps++;
	switch (chance(40)) {
	case 0:
		move(region);
		break;
	case 1:
		exchange(region, (int)chance(QUIET));
		break;
	case 2:
		drop(region, page, count < 64 ? count : 64);
		break;
	case 3:
	case 4:
		protect(region);
		break;
	case 5:
		madvise(regions[region].at, REGION, COLLAPSE);
		break;
	case 6:
		madvise(at, count * PAGE, PAGEOUT);
		break;
	case 7:
		madvise(regions[region].at, REGION, chance(2) ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
		break;
	case 8:
		spawn();
		break;
	case 9:
		write_page(QUIET, page);
		break;
	default:
		for (uint64_t i = 0; i < 16; i++)
			write_page(region, (page + i) % PAGES);
	}
}

static void answer(void)
{
	unsigned long wrong = 0;
	char path[300], text[100];
	int fd;

	for (int region = 0; region < REGIONS; region++)
		for (uint64_t page = 0; page < PAGES; page++) {
			const struct entry *entry = &regions[region].ledger[page];
			const uint64_t *words = (uint64_t *)(regions[region].at + page * PAGE);
			bool right = true;

			for (uint64_t i = 0; i < WORDS && !entry->busy; i++)
				right &= words[i] == word(region, page, entry->version, i);
			wrong += !right;
		}
	snprintf(text, sizeof(text), "%lu %lu %lu\n", REGIONS * PAGES, wrong, (unsigned long)steps);
	snprintf(path, sizeof(path), "%s/answer.new", directory);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		_exit(3);
	close(fd);
	snprintf(text, sizeof(text), "%s/answer", directory);
	rename(path, text);
}

static void on_usr1(int number)
{
	(void)number;
	asked = 1;
}

static void *write_always(void *unused)
{
	(void)unused;
	for (uint64_t i = 0;; i++) {
		pthread_mutex_lock(&lock);
		write_page((int)(i % 4), i * 7 % PAGES);
		pthread_mutex_unlock(&lock);
		usleep(1000);
	}
	return NULL;
}

static void leave_pid(void)
{
	char path[300], text[20];
	int fd, size = snprintf(text, sizeof(text), "%d", getpid());

	snprintf(path, sizeof(path), "%s/pid", directory);
	fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
	if (fd < 0 || write(fd, text, (size_t)size) != size)
		exit(2);
	close(fd);
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_usr1, .sa_flags = SA_RESTART};
	pthread_t thread;

	if (argc != 3)
		return 2;
	random_state = strtoull(argv[1], NULL, 10) * 2 + 1;
	directory = argv[2];
	for (int region = 0; region < REGIONS; region++) {
		regions[region] = (struct region){
			.at = fresh(),
			.ledger = calloc(PAGES, sizeof(struct entry)),
			.protection = PROT_READ | PROT_WRITE,
		};
		if (!regions[region].at || !regions[region].ledger ||
		    mprotect(regions[region].at, REGION, PROT_READ | PROT_WRITE))
			return 2;
		for (uint64_t page = 0; page < PAGES; page += 1 + chance(2))
			write_page(region, page);
		/* Huge pages are written to as a whole, as the soft-dirty bit has it. */
		if (region == QUIET)
			madvise(regions[region].at, REGION, MADV_NOHUGEPAGE);
	}
	sigaction(SIGUSR1, &action, NULL);
	pthread_create(&thread, NULL, write_always, NULL);
	leave_pid();
	for (;;) {
		pthread_mutex_lock(&lock);
		if (asked) {
			asked = 0;
			answer();
		}
		step();
		pthread_mutex_unlock(&lock);
		usleep(2000);
	}
}
