/*
 * shared: anonymous shared memory between a parent and its children, mapped whole, in part, twice,
 * read-only; a large sparse object; one that everybody may only read. What one writes all see.
 */
#include "check.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SHARERS 4
#define SPARSE (256 * MIB)
#define SPARSE_RUN 64 /* pages */
#define READER 2
#define NEW_PAGE 100

/* What each of us has mapped of an object: `pages` covers it whole, the rest is GONE for us. */
static struct pages common, twice, sparse, constant, private_pages;
static char *second; /* another mapping of `common`, of its second half */
static char *alias;  /* `twice` once more, in the same process */
static int self;     /* 0 is the root */

static void *map_shared(size_t size, int prot)
{
	void *start = mmap(NULL, size, prot, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (start == MAP_FAILED)
		die("mmap");
	return start;
}

static bool in_run(size_t page)
{
	return page / SPARSE_RUN % 32 == 5;
}

static void make_objects(void)
{
	void *same;

	pages_at(&common, "common", map_shared(8 * MIB, PROT_READ | PROT_WRITE), 8 * MIB);
	for (size_t page = 0; page < common.count; page += 8)
		pages_write(&common, page, 7, 1, FIRST);
	/* mremap of size 0 maps the same object once more. */
	same = mremap(common.start + 4 * MIB, 0, 4 * MIB, MREMAP_MAYMOVE);
	if (same == MAP_FAILED)
		die("mremap");
	second = same;
	pages_at(&twice, "twice", map_shared(2 * MIB, PROT_READ | PROT_WRITE), 2 * MIB);
	pages_write_every(&twice, 0, 2, 1, FIRST);
	same = mremap(twice.start, 0, 2 * MIB, MREMAP_MAYMOVE);
	if (same == MAP_FAILED)
		die("mremap");
	alias = same;
	check(mprotect(alias, 2 * MIB, PROT_READ), "mprotect");
	pages_at(&sparse, "sparse", map_shared(SPARSE, PROT_READ | PROT_WRITE), SPARSE);
	for (size_t page = 0; page < sparse.count; page++)
		if (in_run(page))
			pages_write(&sparse, page, 1, 1, FIRST);
	pages_at(&constant, "constant", map_shared(4 * MIB, PROT_READ | PROT_WRITE), 4 * MIB);
	pages_write(&constant, 3, constant.count - 9, 1, FIRST);
	check(mprotect(constant.start, 4 * MIB, PROT_READ), "mprotect");
	pages_new(&private_pages, "private", 4 * MIB);
	pages_write(&private_pages, 0, private_pages.count, 1, FIRST);
}

static void unmap(struct pages *pages, size_t first, size_t count)
{
	check(munmap(pages->start + first * PAGE, count * PAGE), "munmap");
	pages_note(pages, first, count, 0, GONE);
}

static void become(int number)
{
	self = number;
	switch (number) {
	case 1: /* the middle only */
		unmap(&common, 0, 512);
		unmap(&common, 1536, 512);
		check(munmap(second, 4 * MIB), "munmap");
		second = NULL;
		break;
	case READER:
		check(mprotect(common.start, 8 * MIB, PROT_READ), "mprotect");
		check(mprotect(twice.start, 2 * MIB, PROT_READ), "mprotect");
		break;
	case 3: /* some here, some there, and at another address */
		unmap(&common, 100, 50);
		unmap(&common, 1000, 3);
		check(munmap(alias, 2 * MIB), "munmap");
		alias = NULL;
		unmap(&sparse, 0, sparse.count / 2);
		second = mremap(second, 4 * MIB, 3 * MIB, 0);
		break;
	default:
		break;
	}
	pages_write_every(&private_pages, number, 5, 1 + number, FIRST);
	pages_target(&private_pages);
}

/* --- checking --- */

/* Pages of holes are not read: that would allocate them. The kernel says that they are holes. */
static void check_sparse(void)
{
	unsigned char there[SPARSE_RUN];

	for (size_t page = 0; page < sparse.count; page += SPARSE_RUN) {
		if (sparse.book[page].generation == GONE)
			continue;
		expect(!mincore(sparse.start + page * PAGE, SPARSE_RUN * PAGE, there),
		       "sparse: mincore");
		for (size_t i = 0; i < SPARSE_RUN; i++)
			if (there[i] & 1 || sparse.book[page + i].generation >= FIRST)
				page_check(&sparse, page + i);
	}
}

static void check_same(const char *what, const struct pages *pages, size_t first, const char *other,
		       size_t count)
{
	for (size_t page = 0; page < count; page++)
		if (pages->book[first + page].generation != GONE)
			expect(!memcmp(pages->start + (first + page) * PAGE, other + page * PAGE,
				       PAGE),
			       "%s: page %zu is not the same in both mappings (pid %d)", what, page,
			       getpid());
}

static void check_objects(void)
{
	pages_check(&common);
	pages_check(&twice);
	pages_check(&constant);
	pages_check(&private_pages);
	check_sparse();
	if (second)
		check_same("common", &common, common.count / 2, second, self == 3 ? 768 : 1024);
	if (alias)
		check_same("twice", &twice, 0, alias, twice.count);
	expect(!writable(constant.start), "constant: writable (pid %d)", getpid());
	if (self == READER)
		expect(!writable(common.start), "common: writable for the reader");
}

/* --- work: in its turn each writes its own part; all others note it --- */

static bool mine(size_t page, unsigned round, int who)
{
	return (page + round) % 9 == (size_t)who;
}

/* Who 1 maps the middle of `common` only, who 3 part of `sparse`: they write where all can see. */
static bool part_of(int who, const struct pages *pages, size_t page)
{
	if (pages == &common && who == 1)
		return page >= 512 && page < 1536;
	if (pages == &common && who == 3)
		return !(page >= 100 && page < 150) && !(page >= 1000 && page < 1003);
	if (pages == &sparse && who == 3)
		return page >= sparse.count / 2;
	return true;
}

static void work_of(int who, unsigned round)
{
	struct pages *const written[] = {&common, &twice, &sparse};

	if (who == READER)
		return;
	for (size_t i = 0; i < 3; i++) {
		struct pages *pages = written[i];

		for (size_t page = 0; page < pages->count; page++) {
			if (pages->book[page].generation < FIRST || !mine(page, round, who) ||
			    !part_of(who, pages, page))
				continue;
			if (who == self)
				pages_write(pages, page, 1, 1 + who, generation_of(round));
			else
				pages_note(pages, page, 1, 1 + who, generation_of(round));
		}
	}
}

/* A page that was a hole. */
static size_t new_page(unsigned round)
{
	return sparse.count - 1 - round % SPARSE_RUN;
}

static void check_new_child(unsigned round)
{
	check_objects();
	pages_write(&sparse, new_page(round), 1, 100, generation_of(round));
}

/* All check; then those from 0 on write in turn; then all note what a new child wrote. */
static void serve(unsigned round, unsigned phase)
{
	if (phase == 0)
		check_objects();
	else if (phase == NEW_PAGE)
		pages_note(&sparse, new_page(round), 1, 100, generation_of(round));
	else
		work_of(phase - 1, round);
	if (phase == NEW_PAGE)
		pages_renew(&private_pages, 1 + self, round);
}

static void all(unsigned round, unsigned phase)
{
	ask_children(round, phase);
	serve(round, phase);
}

void set_up(void)
{
	make_objects();
	for (int number = 1; number < SHARERS; number++)
		start_child(number, become, serve);
	pages_target(&common);
	pages_target(&twice);
	pages_target(&sparse);
	pages_target(&private_pages);
}

void answer(unsigned round)
{
	all(round, 0);
	if (!all_right())
		return;
	for (unsigned who = 0; who < SHARERS; who++)
		all(round, 1 + who);
	in_new_child(check_new_child, round);
	all(round, NEW_PAGE);
	all(round, 0);
}
