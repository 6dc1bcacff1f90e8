/*
 * cow: a parent and its children share pages copy-on-write and differ in some, each child in a
 * way of its own (see `differ`). Everyone sees exactly its own data and nobody else's.
 */
#include "check.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define KINDS 9

static char data_bytes[MIB] __attribute__((aligned(4096))) = {1};
static char bss_bytes[MIB] __attribute__((aligned(4096)));

static struct pages big, heap, data, bss, late;
static struct pages *const areas[] = {&big, &heap, &data, &bss, &late};
static unsigned writer; /* which of us: the root is 1 */

#define AREAS (sizeof(areas) / sizeof(areas[0]))

static void drop(struct pages *pages, size_t first, size_t count)
{
	check(madvise(pages->start + first * PAGE, count * PAGE, MADV_DONTNEED), "MADV_DONTNEED");
	pages_note(pages, first, count, 0, ZERO);
}

static void flip_every(struct pages *pages, size_t step)
{
	for (size_t page = 2; page < pages->count; page += step)
		if (pages->book[page].generation >= FIRST)
			pages_flip(pages, page);
}

/* Write pages anew with what they hold already: equal, but not shared any more. */
static void write_equal(struct pages *pages)
{
	for (size_t page = 0; page < pages->count; page += 4) {
		char *at = pages->start + page * PAGE;

		if (pages->book[page].generation < FIRST)
			continue;
		at[0] ^= 0x55;
		__asm__ volatile("" ::: "memory");
		at[0] ^= 0x55;
	}
}

static void answer_child(unsigned round, unsigned phase);

static void differ_again(int number)
{
	writer = 100 + number;
	for (size_t i = 0; i < AREAS; i++) {
		pages_write_every(areas[i], 0, 6, writer, FIRST); /* half of the parent's changes */
		pages_write_every(areas[i], 1, 9, writer, FIRST);
	}
	pages_target(&big);
}

static void differ(int number)
{
	writer = 2 + number;
	for (size_t i = 0; i < AREAS; i++) {
		struct pages *pages = areas[i];

		switch (number) {
		case 0:
			pages_write_every(pages, 0, 3, writer, FIRST);
			break;
		case 1: /* one byte in a page */
			flip_every(pages, 5);
			break;
		case 2: /* a whole run */
			pages_write(pages, pages->count / 4, pages->count / 4, writer, FIRST);
			break;
		case 3: /* and its child changes some of them again, and others */
			pages_write_every(pages, 0, 3, writer, FIRST);
			break;
		case 4:
			write_equal(pages);
			break;
		case 5: /* holes where the parent has pages */
			if (pages == &big) {
				munmap(pages->start + 100 * PAGE, 100 * PAGE);
				pages_note(pages, 100, 100, 0, GONE);
			}
			if (pages == &big || pages == &heap || pages == &bss)
				drop(pages, 20, 40);
			break;
		case 6: /* pages that the parent does not have */
			for (size_t page = 0; page < pages->count; page++)
				if (pages->book[page].generation == ZERO && page % 2)
					pages_write(pages, page, 1, writer, FIRST);
			break;
		case 7: /* everything */
			pages_write(pages, 0, pages->count, writer, FIRST);
			break;
		default: /* nothing */
			break;
		}
	}
	if (number == 3)
		start_child(number, differ_again, answer_child);
	pages_target(&big);
}

static void check_areas(void)
{
	for (size_t i = 0; i < AREAS; i++)
		pages_check(areas[i]);
}

static void check_new_child(unsigned round)
{
	check_areas();
	if (!all_right())
		return;
	for (size_t i = 0; i < AREAS; i++)
		pages_renew(areas[i], 200 + writer, round);
	check_areas();
}

/* First everybody checks, then one after the other works, then all check again. */
static void take_part(unsigned round, unsigned phase)
{
	ask_children(round, phase);
	if (phase != 1) {
		check_areas();
		return;
	}
	for (size_t i = 0; i < AREAS; i++)
		pages_renew(areas[i], writer, round);
	in_new_child(check_new_child, round);
	check_areas();
}

static void answer_child(unsigned round, unsigned phase)
{
	take_part(round, phase);
}

static void make_areas(void)
{
	char *start = sbrk(0);
	size_t gap = (PAGE - (uintptr_t)start % PAGE) % PAGE;

	pages_new(&big, "big", 8 * MIB);
	for (size_t page = 0; page < big.count; page += 64) /* 56 pages of 64 */
		pages_write(&big, page, 56, 1, FIRST);
	if (sbrk(gap + MIB) != start)
		die("sbrk");
	pages_at(&heap, "heap", start + gap, MIB);
	pages_write(&heap, 0, heap.count - 8, 1, FIRST);
	pages_at(&data, "data", data_bytes, sizeof(data_bytes));
	pages_write(&data, 0, data.count, 1, FIRST);
	pages_at(&bss, "bss", bss_bytes, sizeof(bss_bytes));
	pages_write(&bss, 0, 200, 1, FIRST);
	pages_new(&late, "late", 2 * MIB);
	pages_write_every(&late, 0, 2, 1, FIRST);
}

void set_up(void)
{
	writer = 1;
	make_areas();
	for (int number = 0; number < KINDS; number++)
		start_child(number, differ, answer_child);
	/* Pages that only the parent has, and pages that only it has anew. */
	pages_write_every(&late, 1, 4, 1, FIRST + 1);
	pages_write_every(&big, 5, 7, 1, FIRST + 1);
	pages_write_every(&data, 5, 7, 1, FIRST + 1);
	for (size_t i = 0; i < AREAS; i++)
		pages_target(areas[i]);
}

void answer(unsigned round)
{
	take_part(round, 0);
	if (!all_right())
		return;
	take_part(round, 1);
	take_part(round, 2);
}
