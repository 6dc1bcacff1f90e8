/* smallvmas: thousands of VMAs of one or two pages; protections alternate, so that none merge. */
#include "check.h"

#include <sys/mman.h>

#define VMAS 4000
#define SLOT 3 /* pages; a VMA takes one or two of them, and what is left is not mapped */

static struct pages all;
static struct pages big;

static size_t first_page(size_t vma)
{
	return vma * SLOT;
}

static size_t length(size_t vma)
{
	return 1 + vma % 3 % 2;
}

static int protection(size_t vma)
{
	static const int protections[] = {PROT_READ | PROT_WRITE, PROT_READ, PROT_READ | PROT_WRITE,
					  PROT_NONE, PROT_READ | PROT_EXEC};

	return protections[vma % 5];
}

/* Every eleventh has never been touched. */
static bool touched(size_t vma)
{
	return vma % 11 != 7;
}

static void protect(size_t vma, int prot)
{
	check(mprotect(all.start + first_page(vma) * PAGE, length(vma) * PAGE, prot), "mprotect");
}

void set_up(void)
{
	char *start = map_anonymous((VMAS * SLOT + 2) * PAGE, PROT_NONE, MAP_NORESERVE);

	pages_at(&all, "small", start + PAGE, VMAS * SLOT * PAGE);
	for (size_t vma = 0; vma < VMAS; vma++) {
		size_t gap = first_page(vma) + length(vma);

		protect(vma, PROT_READ | PROT_WRITE);
		if (touched(vma))
			pages_write(&all, first_page(vma), length(vma), 1, FIRST);
		/* Some have neighbours, some have holes between them. */
		pages_note(&all, gap, SLOT - length(vma), 0, GONE);
		check(munmap(all.start + gap * PAGE, (SLOT - length(vma)) * PAGE), "munmap");
		protect(vma, protection(vma));
	}
	pages_target(&all);
	pages_new(&big, "big", 4 * MIB);
	pages_write(&big, 0, big.count, 1, FIRST);
	pages_target(&big);
}

static void check_all(void)
{
	for (size_t vma = 0; vma < VMAS; vma++) {
		bool closed = protection(vma) == PROT_NONE;

		if (closed)
			protect(vma, PROT_READ);
		for (size_t i = 0; i < length(vma); i++)
			page_check(&all, first_page(vma) + i);
		if (closed)
			protect(vma, PROT_NONE);
	}
	for (size_t vma = 0; vma < VMAS; vma += 97) {
		char *at = all.start + first_page(vma) * PAGE;

		expect(readable(at) == (protection(vma) != PROT_NONE), "vma %zu: readable: %d", vma,
		       readable(at));
		if (protection(vma) & PROT_READ && !(protection(vma) & PROT_WRITE))
			expect(!writable(at), "vma %zu is writable", vma);
		expect(!readable(at + length(vma) * PAGE), "behind vma %zu is something", vma);
	}
	pages_check(&big);
}

void answer(unsigned round)
{
	check_all();
	if (!all_right())
		return;
	for (size_t vma = round % 5; vma < VMAS; vma += 5) {
		protect(vma, PROT_READ | PROT_WRITE);
		if (touched(vma) || vma % 2)
			pages_write(&all, first_page(vma), length(vma), 1, generation_of(round));
		protect(vma, protection(vma));
	}
	pages_renew(&big, 1, round);
	check_all();
}
