/*
 * special: memory that is locked, or that has advice of its own: not for children, wiped for
 * children, not for core dumps, to be merged; guard pages of both kinds; droppable pages.
 *
 * What not every CRIU restores is asked for by argument: wipe, guard, droppable.
 */
#include "check.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define MAP_DROPPABLE_ 0x08
#define MADV_GUARD_INSTALL_ 102
#define MADV_GUARD_REMOVE_ 103
#define SAME 256 /* pages that are all alike */

static struct pages map_locked, half_locked, locked_read_only, on_fault, not_forked, not_dumped,
	mergeable, wiped, guarded, droppable, plain;
static char *same;    /* mergeable, too */
static size_t guards; /* installed in `guarded`, every GUARD_STEP pages */

#define GUARD_STEP 8

static void make_locked(void)
{
	char *start = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);

	if (start == MAP_FAILED)
		die("MAP_LOCKED");
	pages_at(&map_locked, "MAP_LOCKED", start, 2 * MIB);
	pages_write_every(&map_locked, 0, 2, 1, FIRST);
	pages_new(&half_locked, "mlock of one half", 2 * MIB);
	pages_write_every(&half_locked, 1, 2, 1, FIRST);
	check(mlock(half_locked.start, MIB), "mlock");
	pages_new(&locked_read_only, "locked and read-only", MIB);
	pages_write_every(&locked_read_only, 0, 3, 1, FIRST);
	check(mprotect(locked_read_only.start, MIB, PROT_READ), "mprotect");
	check(mlock(locked_read_only.start, MIB), "mlock");
	pages_new(&on_fault, "locked on fault", MIB);
	check(mlock2(on_fault.start, MIB, MLOCK_ONFAULT), "mlock2");
	pages_write_every(&on_fault, 0, 4, 1, FIRST);
}

static void advise(struct pages *pages, const char *name, size_t size, int advice)
{
	pages_new(pages, name, size);
	check(madvise(pages->start, size, advice), name);
	pages_write_every(pages, 0, 2, 1, FIRST);
}

static void make_guards(void)
{
	pages_new(&guarded, "guarded", 2 * MIB);
	pages_write(&guarded, 0, guarded.count, 1, FIRST);
	if (!has_argument("guard"))
		return;
	for (size_t page = 5; page < guarded.count; page += GUARD_STEP, guards++) {
		check(madvise(guarded.start + page * PAGE, PAGE, MADV_GUARD_INSTALL_),
		      "MADV_GUARD_INSTALL");
		pages_note(&guarded, page, 1, 0, GONE);
	}
}

static void make_droppable(void)
{
	char *start;

	if (!has_argument("droppable"))
		return;
	start = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_DROPPABLE_ | MAP_ANONYMOUS, -1, 0);
	if (start == MAP_FAILED)
		die("MAP_DROPPABLE");
	pages_at(&droppable, "droppable", start, MIB);
	pages_write(&droppable, 0, droppable.count / 2, 1, FIRST);
}

void set_up(void)
{
	struct pages *const all[] = {&map_locked, &half_locked, &locked_read_only, &on_fault,
				     &not_forked, &not_dumped,  &mergeable,        &wiped,
				     &guarded,    &plain};

	make_locked();
	advise(&not_forked, "DONTFORK", 2 * MIB, MADV_DONTFORK);
	advise(&not_dumped, "DONTDUMP", 2 * MIB, MADV_DONTDUMP);
	advise(&mergeable, "MERGEABLE", 2 * MIB, MADV_MERGEABLE);
	same = map_anonymous(SAME * PAGE, PROT_READ | PROT_WRITE, 0);
	check(madvise(same, SAME * PAGE, MADV_MERGEABLE), "MADV_MERGEABLE");
	for (size_t page = 0; page < SAME; page++)
		fill(same + page * PAGE, 4711);
	if (has_argument("wipe"))
		advise(&wiped, "WIPEONFORK", 2 * MIB, MADV_WIPEONFORK);
	make_guards();
	make_droppable();
	pages_new(&plain, "plain", 4 * MIB);
	pages_write(&plain, 0, plain.count, 1, FIRST);
	for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
		pages_target(all[i]);
	target(same + 77 * PAGE + 123, "merged");
}

/* --- checking --- */

static void check_same(void)
{
	uint64_t page[PAGE / 8];

	fill(page, 4711);
	for (size_t i = 0; i < SAME; i++)
		expect(!memcmp(same + i * PAGE, page, PAGE), "mergeable: page %zu is not as all",
		       i);
}

static void check_guards(void)
{
	for (size_t page = 5; page < guarded.count && guards; page += GUARD_STEP)
		expect(!readable(guarded.start + page * PAGE), "guard page %zu is readable", page);
	/* Those with PROT_NONE, around every area. */
	expect(!readable(plain.start - 1), "no guard before the area");
	expect(!readable(plain.start + plain.count * PAGE), "no guard after the area");
}

static void check_droppable(void)
{
	for (size_t page = 0; page < droppable.count; page++)
		if (!is_zero(droppable.start + page * PAGE))
			page_check(&droppable, page);
}

static void check_common(void)
{
	pages_check(&map_locked);
	pages_check(&half_locked);
	pages_check(&locked_read_only);
	pages_check(&on_fault);
	pages_check(&not_dumped);
	pages_check(&mergeable);
	pages_check(&guarded);
	pages_check(&plain);
	expect(!writable(locked_read_only.start), "locked_read_only is writable");
	check_same();
	check_guards();
}

static void check_child(unsigned round)
{
	(void)round;
	check_common();
	for (size_t page = 0; page < not_forked.count; page += 50)
		expect(!readable(not_forked.start + page * PAGE),
		       "DONTFORK: the child has page %zu", page);
	for (size_t page = 0; page < wiped.count; page++)
		expect(is_zero(wiped.start + page * PAGE), "WIPEONFORK: the child has page %zu",
		       page);
	for (size_t page = 0; page < droppable.count; page++)
		expect(is_zero(droppable.start + page * PAGE), "droppable: the child has page %zu",
		       page);
}

static void check_all(void)
{
	check_common();
	check_droppable();
	pages_check(&not_forked);
	pages_check(&wiped);
}

static void move_guard(unsigned round)
{
	size_t page = 5 + GUARD_STEP * (round % guards);
	char *at = guarded.start + page * PAGE;

	expect(!madvise(at, PAGE, MADV_GUARD_REMOVE_), "MADV_GUARD_REMOVE");
	expect(is_zero(at), "under guard page %zu is not zero", page);
	expect(!madvise(at, PAGE, MADV_GUARD_INSTALL_), "MADV_GUARD_INSTALL");
}

void answer(unsigned round)
{
	struct pages *const renewed[] = {&map_locked, &half_locked, &on_fault,
					 &not_forked, &not_dumped,  &mergeable,
					 &wiped,      &guarded,     &plain};

	check_all();
	if (!all_right())
		return;
	in_new_child(check_child, round);
	for (size_t i = 0; i < sizeof(renewed) / sizeof(renewed[0]); i++)
		pages_renew(renewed[i], 1, round);
	if (guards)
		move_guard(round);
	if (droppable.count)
		pages_write(&droppable, 0, droppable.count / 2, 1, generation_of(round));
	check_all();
	in_new_child(check_child, round);
}
