/*
 * hugetlb: pages of 2 MiB from the kernel's pool: private, shared anonymous, a memfd of them, also
 * between parent and child. The guest needs vm.nr_hugepages.
 */
#include "check.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE (2 * MIB)

static struct pages alone, read_only, shared, file, plain;
static int fd, self;

static char *map_huge(size_t size, int flags, int from)
{
	char *start = mmap(NULL, size, PROT_READ | PROT_WRITE, flags | MAP_HUGETLB, from, 0);

	if (start == MAP_FAILED)
		die("MAP_HUGETLB");
	return start;
}

static void check_all(void)
{
	pages_check(&shared);
	pages_check(&file);
	pages_check(&plain);
	if (self == 0) {
		pages_check(&alone);
		pages_check(&read_only);
		expect(!writable(read_only.start), "the read-only one is writable");
	}
	expect(lseek(fd, 0, SEEK_END) == (off_t)(file.count * PAGE), "memfd: size %ld",
	       (long)lseek(fd, 0, SEEK_END));
}

static void work_of(int who, unsigned round)
{
	struct pages *const written[] = {&shared, &file};

	for (size_t i = 0; i < 2; i++)
		for (size_t page = who; page < written[i]->count; page += 5 + round % 3) {
			if (written[i]->book[page].generation < FIRST)
				continue;
			if (self == who)
				pages_write(written[i], page, 1, 1 + who, generation_of(round));
			else
				pages_note(written[i], page, 1, 1 + who, generation_of(round));
		}
}

static void serve(unsigned round, unsigned phase)
{
	if (phase)
		work_of(phase - 1, round);
	else
		check_all();
	if (phase == 2)
		pages_renew(&plain, 1 + self, round);
}

static void all(unsigned round, unsigned phase)
{
	ask_children(round, phase);
	serve(round, phase);
}

static void become(int number)
{
	self = number;
	/* Private huge pages are the parent's alone. */
	check(munmap(alone.start, alone.count * PAGE), "munmap");
	check(munmap(read_only.start, read_only.count * PAGE), "munmap");
	pages_write_every(&plain, 1, 2, 1 + number, FIRST);
}

void set_up(void)
{
	pages_at(&alone, "private", map_huge(4 * HUGE, MAP_PRIVATE | MAP_ANONYMOUS, -1), 4 * HUGE);
	/* The second one is never touched, of the last one only some. */
	pages_write(&alone, 0, HUGE / PAGE, 1, FIRST);
	pages_write(&alone, 2 * HUGE / PAGE, HUGE / PAGE, 1, FIRST);
	pages_write_every(&alone, 3 * HUGE / PAGE + 9, 50, 1, FIRST);
	pages_at(&read_only, "private, read-only", map_huge(HUGE, MAP_PRIVATE | MAP_ANONYMOUS, -1),
		 HUGE);
	pages_write_every(&read_only, 0, 3, 1, FIRST);
	check(mprotect(read_only.start, HUGE, PROT_READ), "mprotect");
	pages_at(&shared, "shared", map_huge(2 * HUGE, MAP_SHARED | MAP_ANONYMOUS, -1), 2 * HUGE);
	pages_write_every(&shared, 0, 2, 1, FIRST);
	fd = check(memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB), "memfd_create");
	check(ftruncate(fd, 2 * HUGE), "ftruncate");
	pages_at(&file, "memfd", map_huge(2 * HUGE, MAP_SHARED, fd), 2 * HUGE);
	pages_write_every(&file, 0, 2, 1, FIRST);
	pages_new(&plain, "plain", 2 * MIB);
	pages_write(&plain, 0, plain.count, 1, FIRST);
	start_child(1, become, serve);
	pages_target(&alone);
	/* Not `read_only`: for hugetlb the kernel does not let /proc/PID/mem override that. */
	pages_target(&shared);
	pages_target(&file);
	pages_target(&plain);
}

void answer(unsigned round)
{
	all(round, 0);
	if (!all_right())
		return;
	all(round, 1);
	all(round, 2);
	pages_renew(&alone, 1, round);
	check(mprotect(read_only.start, HUGE, PROT_READ | PROT_WRITE), "mprotect");
	pages_renew(&read_only, 1, round);
	check(mprotect(read_only.start, HUGE, PROT_READ), "mprotect");
	all(round, 0);
}
