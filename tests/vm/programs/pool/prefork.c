/*
 * prefork: a server whose workers share its memory copy-on-write; each has changed a little: a run
 * in one piece, and scattered pages. Requests go through socket pairs (see `start_child`).
 */
#include "check.h"

#include <string.h>

#define WORKERS 20
#define RUN (MIB / PAGE)

static struct pages store, private_pages;
static int worker; /* 0 is the parent */

static void serve(unsigned round, unsigned phase)
{
	/* Each request wants other pages, the first of a round all of them. */
	if (phase == 0) {
		pages_check(&store);
		pages_check(&private_pages);
		return;
	}
	for (size_t page = (round * 7 + phase) % 13; page < store.count; page += 13)
		page_check(&store, page);
	pages_write(&store, (worker * 97 + round * 31 + phase) % store.count, 1, 1 + worker,
		    generation_of(round));
	pages_renew(&private_pages, 1 + worker, round + phase);
	page_check(&private_pages, (round + phase) % private_pages.count);
}

static void begin_worker(int number)
{
	worker = number;
	pages_write(&store, 256 * number + 17, RUN, 1 + number, FIRST);
	pages_write_every(&store, 31 * number, 701, 1 + number, FIRST);
	pages_new(&private_pages, "a worker's own", MIB / 4);
	pages_write_every(&private_pages, 0, 2, 1 + number, FIRST);
	if (number % 6 == 1) {
		pages_target(&store);
		pages_target(&private_pages);
	}
}

void set_up(void)
{
	pages_new(&store, "store", 40 * MIB);
	pages_write(&store, 0, store.count - 3, 1, FIRST);
	for (int number = 1; number <= WORKERS; number++)
		start_child(number, begin_worker, serve);
	pages_new(&private_pages, "the parent's own", MIB);
	pages_write(&private_pages, 0, private_pages.count, 1, FIRST);
	pages_target(&store);
	pages_target(&private_pages);
}

void answer(unsigned round)
{
	ask_children(round, 0);
	serve(round, 0);
	if (!all_right())
		return;
	for (unsigned phase = 1; phase <= 3; phase++)
		for (int i = 0; i < child_count; i++)
			ask_child(i, round, phase);
	serve(round, 1);
	ask_children(round, 0);
	serve(round, 0);
}
