/*
 * memfd: memfds that are mapped shared, mapped private with changes, only open, only mapped,
 * sealed; handed to children. What one writes all see.
 */
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SHARERS 3 /* the root is 0 */
#define CHILD_ONLY 2

/* A memfd; `copy` is a private mapping of it, `pages` a shared one or a buffer to read into. */
struct object {
	int fd;
	struct pages pages, copy;
	bool mapped;
};

static struct object shared, both, only_open, only_mapped, sized, sealed, of_child;
static struct pages plain;
static int self;

static void make_object(struct object *object, const char *name, size_t size, bool mapped,
			unsigned flags)
{
	void *start;

	object->fd = check(memfd_create(name, MFD_CLOEXEC | flags), "memfd_create");
	object->mapped = mapped;
	check(ftruncate(object->fd, size), "ftruncate");
	start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, object->fd, 0);
	if (start == MAP_FAILED)
		die("mmap");
	pages_at(&object->pages, name, start, size);
	for (size_t page = 0; page < object->pages.count; page += 10) /* with holes */
		pages_write(&object->pages, page, 8, 1, FIRST);
	if (mapped)
		return;
	check(munmap(start, size), "munmap");
	/* Its content is read into a buffer that is empty between the rounds. */
	object->pages.start = map_anonymous(size, PROT_READ | PROT_WRITE, 0);
}

static void seal(struct object *object, int seals)
{
	check(fcntl(object->fd, F_ADD_SEALS, seals), "F_ADD_SEALS");
}

static void map_copy(struct object *object, const char *name)
{
	size_t size = object->pages.count * PAGE;
	void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, object->fd, 0);

	if (start == MAP_FAILED)
		die("mmap");
	pages_at(&object->copy, name, start, size);
	/* Unchanged pages are the memfd's, checked elsewhere by reading it. */
	pages_note(&object->copy, 0, object->copy.count, 0, GONE);
	pages_write_every(&object->copy, 1, 3, 50 + self, FIRST);
}

static void serve(unsigned round, unsigned phase);

static void become(int number)
{
	self = number;
	pages_write_every(&plain, number, 3, 1 + number, FIRST);
	/* A private copy of its own. */
	check(munmap(both.copy.start, both.copy.count * PAGE), "munmap");
	map_copy(&both, "a child's private mapping");
	if (number == CHILD_ONLY) {
		make_object(&of_child, "of-child", MIB, true, 0);
		pages_target(&of_child.pages);
		close(only_open.fd); /* the others still have it */
		only_open.fd = -1;
	}
	pages_target(&both.copy);
}

void set_up(void)
{
	pages_new(&plain, "plain", 2 * MIB);
	pages_write(&plain, 0, plain.count, 1, FIRST);
	make_object(&shared, "shared", 4 * MIB, true, 0);
	make_object(&both, "both", 2 * MIB, true, 0);
	map_copy(&both, "private mapping");
	make_object(&only_open, "only-open", 4 * MIB, false, 0);
	make_object(&only_mapped, "only-mapped", 2 * MIB, true, 0);
	close(only_mapped.fd);
	only_mapped.fd = -1;
	make_object(&sized, "sized", 2 * MIB, true, MFD_ALLOW_SEALING);
	seal(&sized, F_SEAL_SHRINK | F_SEAL_GROW);
	make_object(&sealed, "sealed", 2 * MIB, false, MFD_ALLOW_SEALING);
	seal(&sealed, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
	for (int number = 1; number < SHARERS; number++)
		start_child(number, become, serve);
	pages_target(&shared.pages);
	pages_target(&both.pages);
	pages_target(&both.copy);
	pages_target(&only_mapped.pages);
	pages_target(&sized.pages);
	pages_target(&plain);
}

/* --- checking --- */

static void check_object(struct object *object)
{
	struct pages *pages = &object->pages;
	size_t size = pages->count * PAGE;

	if (!pages->start)
		return;
	if (object->fd >= 0)
		expect(lseek(object->fd, 0, SEEK_END) == (off_t)size, "%s: size %ld", pages->name,
		       (long)lseek(object->fd, 0, SEEK_END));
	if (object->mapped) {
		pages_check(pages);
	} else if (object->fd >= 0) {
		for (size_t page = 0; page < pages->count; page++)
			expect(pread(object->fd, pages->start + page * PAGE, PAGE, page * PAGE) ==
				       PAGE,
			       "%s: page %zu cannot be read", pages->name, page);
		pages_check(pages);
		check(madvise(pages->start, size, MADV_DONTNEED), "MADV_DONTNEED");
	}
}

static void check_copy(struct object *object)
{
	pages_check(&object->copy);
	for (size_t page = 0; page < object->copy.count; page++)
		if (object->copy.book[page].generation == GONE)
			expect(!memcmp(object->copy.start + page * PAGE,
				       object->pages.start + page * PAGE, PAGE),
			       "private mapping: unchanged page %zu is not the memfd's", page);
}

static void check_seals(void)
{
	char byte = 1;

	expect(fcntl(sized.fd, F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW), "sized: seals %#x",
	       fcntl(sized.fd, F_GET_SEALS));
	expect(ftruncate(sized.fd, MIB) < 0 && errno == EPERM, "sized: can be made smaller");
	expect(ftruncate(sized.fd, 4 * MIB) < 0 && errno == EPERM, "sized: can be made larger");
	expect(fcntl(sealed.fd, F_GET_SEALS) ==
		       (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL),
	       "sealed: seals %#x", fcntl(sealed.fd, F_GET_SEALS));
	expect(pwrite(sealed.fd, &byte, 1, 0) < 0 && errno == EPERM, "sealed: can be written");
}

static void check_all(void)
{
	check_object(&shared);
	check_object(&both);
	check_object(&only_open);
	check_object(&only_mapped);
	check_object(&sized);
	check_object(&sealed);
	check_object(&of_child);
	check_copy(&both);
	check_seals();
	pages_check(&plain);
}

/* --- work: in turn each writes its part, and the others note it --- */

static void write_through(struct object *object, size_t page)
{
	if (pwrite(object->fd, object->pages.start + page * PAGE, PAGE, page * PAGE) != PAGE)
		expect(false, "%s: page %zu cannot be written", object->pages.name, page);
}

static void work_of(unsigned who, unsigned round)
{
	struct object *const written[] = {&shared, &both, &only_open, &only_mapped, &sized};

	for (size_t i = 0; i < sizeof(written) / sizeof(written[0]); i++) {
		struct object *object = written[i];
		struct pages *pages = &object->pages;

		if (object == &only_open && who == CHILD_ONLY)
			continue;
		for (size_t page = who; page < pages->count; page += 5 + round % 3) {
			if ((unsigned)self != who) {
				pages_note(pages, page, 1, 1 + who, generation_of(round));
				continue;
			}
			pages_write(pages, page, 1, 1 + who, generation_of(round));
			if (!object->mapped)
				write_through(object, page);
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
	if (!all_right())
		return;
	pages_renew(&plain, 1 + self, round);
	pages_renew(&both.copy, 50 + self, round);
	if (self == CHILD_ONLY)
		pages_renew(&of_child.pages, 1 + self, round);
}

static void all(unsigned round, unsigned phase)
{
	ask_children(round, phase);
	serve(round, phase);
}

void answer(unsigned round)
{
	all(round, 0);
	if (!all_right())
		return;
	for (unsigned who = 0; who < SHARERS; who++)
		all(round, 1 + who);
	all(round, 0);
}
