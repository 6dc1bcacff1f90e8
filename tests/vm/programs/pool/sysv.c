/*
 * sysv: SysV shared memory, attached by several processes, twice by one, read-only by one; one
 * segment that nobody has attached. It needs an IPC namespace of its own, or CRIU refuses it.
 */
#include "check.h"

#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <unistd.h>

#define SHARERS 4 /* the root is 0 */
#define READER 2
#define ALONE 3 /* the one that has not attached `second` */

struct segment {
	int id;
	key_t key;
	size_t size;
	unsigned mode;
	struct pages pages;
};

static struct segment first = {.key = 0x6f7672, .size = 4 * MIB, .mode = 0600};
static struct segment second = {.key = IPC_PRIVATE, .size = 4 * MIB, .mode = 0640};
static struct segment loose = {.key = 0x6f7673, .size = 4 * MIB, .mode = 0600};
static struct pages plain;
static char *alias; /* `first` once more */
static int self;

static void *attach(const struct segment *segment, int flags)
{
	void *start = shmat(segment->id, NULL, flags);

	if (start == (void *)-1)
		die("shmat");
	return start;
}

static void make_segment(struct segment *segment, const char *name)
{
	segment->id =
		check(shmget(segment->key, segment->size, IPC_CREAT | IPC_EXCL | segment->mode),
		      "shmget");
	pages_at(&segment->pages, name, attach(segment, 0), segment->size);
	for (size_t page = 0; page < segment->pages.count; page += 10)
		pages_write(&segment->pages, page, 7, 1, FIRST);
}

static void become(int number)
{
	self = number;
	pages_write_every(&plain, number, 3, 1 + number, FIRST);
	if (number == READER) {
		check(shmdt(first.pages.start), "shmdt");
		first.pages.start = attach(&first, SHM_RDONLY);
	}
	if (number == ALONE) {
		check(shmdt(second.pages.start), "shmdt");
		second.pages.start = NULL;
		check(shmdt(alias), "shmdt");
		alias = NULL;
	}
	pages_target(&plain);
}

static void check_segment(const struct segment *segment)
{
	struct shmid_ds state;

	if (!expect(!shmctl(segment->id, IPC_STAT, &state), "%s: IPC_STAT", segment->pages.name))
		return;
	expect(state.shm_segsz == segment->size, "%s: size %zu", segment->pages.name,
	       state.shm_segsz);
	expect((state.shm_perm.mode & 0777) == segment->mode, "%s: mode %#o", segment->pages.name,
	       state.shm_perm.mode);
	if (segment->key != IPC_PRIVATE)
		expect(shmget(segment->key, 0, 0) == segment->id, "%s: the key has another",
		       segment->pages.name);
	if (segment->pages.start)
		pages_check(&segment->pages);
}

static void check_loose(void)
{
	struct shmid_ds state = {0};

	shmctl(loose.id, IPC_STAT, &state);
	expect(state.shm_nattch == 0, "loose: attached by %lu", (unsigned long)state.shm_nattch);
	loose.pages.start = attach(&loose, SHM_RDONLY);
	check_segment(&loose);
	check(shmdt(loose.pages.start), "shmdt");
	loose.pages.start = NULL;
}

static void check_all(void)
{
	check_segment(&first);
	check_segment(&second);
	pages_check(&plain);
	if (self == READER)
		expect(!writable(first.pages.start), "first: the reader can write");
	if (alias)
		for (size_t page = 0; page < first.pages.count; page++)
			expect(*(uint64_t *)(alias + page * PAGE + 8) ==
				       *(uint64_t *)(first.pages.start + page * PAGE + 8),
			       "first: page %zu differs in the second mapping", page);
	if (self == 0)
		check_loose();
}

static void work_of(unsigned who, unsigned round)
{
	struct segment *const written[] = {&first, &second};

	for (size_t i = 0; i < 2; i++) {
		struct pages *pages = &written[i]->pages;

		if ((who == READER && i == 0) || (who == ALONE && i == 1) || !pages->start)
			continue;
		for (size_t page = who; page < pages->count; page += 7 + round % 3) {
			if ((unsigned)self == who)
				pages_write(pages, page, 1, 1 + who, generation_of(round));
			else
				pages_note(pages, page, 1, 1 + who, generation_of(round));
		}
	}
}

static void serve(unsigned round, unsigned phase)
{
	if (phase) {
		work_of(phase - 1, round);
		return;
	}
	check_all();
	if (all_right())
		pages_renew(&plain, 1 + self, round);
}

static void all(unsigned round, unsigned phase)
{
	ask_children(round, phase);
	serve(round, phase);
}

/* A new segment, gone again. */
static void make_another(unsigned round)
{
	struct segment fresh = {.key = IPC_PRIVATE, .size = MIB, .mode = 0600};

	make_segment(&fresh, "fresh");
	pages_renew(&fresh.pages, 1, round);
	check_segment(&fresh);
	shmdt(fresh.pages.start);
	munmap(fresh.pages.book, PAGE);
	expect(!shmctl(fresh.id, IPC_RMID, NULL), "fresh: IPC_RMID");
}

void set_up(void)
{
	pages_new(&plain, "plain", 2 * MIB);
	pages_write(&plain, 0, plain.count, 1, FIRST);
	make_segment(&first, "first");
	alias = attach(&first, 0);
	make_segment(&second, "second");
	make_segment(&loose, "loose");
	check(shmdt(loose.pages.start), "shmdt");
	loose.pages.start = NULL;
	for (int number = 1; number < SHARERS; number++)
		start_child(number, become, serve);
	pages_target(&first.pages);
	pages_target(&second.pages);
	pages_target(&plain);
}

void answer(unsigned round)
{
	all(round, 0);
	if (!all_right())
		return;
	for (unsigned who = 0; who < SHARERS; who++)
		all(round, 1 + who);
	make_another(round);
	all(round, 0);
}
