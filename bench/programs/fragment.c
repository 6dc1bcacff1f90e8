/*
 * bench-fragment: leaves the guest no free memory but single, scattered pages.
 *
 *     bench-fragment BYTES RESERVE READY
 *
 * Takes all available memory but RESERVE page by page (transparent huge pages must be off), then
 * gives back every other page, in random order, until BYTES are free again, makes the file READY
 * and waits for its end. Neighbouring pages came from one block of the buddy allocator, so the
 * buddy of a page that is given back is still in use: nothing can be merged.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ull

static void die(const char *what)
{
	fprintf(stderr, "bench-fragment: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t available(void)
{
	char line[256];
	unsigned long long kib = 0;
	FILE *file = fopen("/proc/meminfo", "r");

	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
			break;
	if (file)
		fclose(file);
	return kib << 10;
}

static uint64_t random_below(uint64_t limit)
{
	static uint64_t state = 88172645463325252ull;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state % limit;
}

int main(int argc, char **argv)
{
	uint64_t give, take, pages;
	uint32_t *order;
	char *memory;

	if (argc != 4) {
		fprintf(stderr, "usage: bench-fragment BYTES RESERVE READY\n");
		return 2;
	}
	give = strtoull(argv[1], NULL, 0);
	take = available() - strtoull(argv[2], NULL, 0);
	pages = take / PAGE / 2;
	if (!pages || take > available() || give > pages * PAGE) {
		fprintf(stderr, "bench-fragment: too little memory is available\n");
		return 1;
	}
	order = calloc(pages, sizeof(*order));
	memory = mmap(NULL, take, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!order || memory == MAP_FAILED)
		die("mmap");
	if (madvise(memory, take, MADV_POPULATE_WRITE) < 0)
		die("populate");
	for (uint64_t i = 0; i < pages; i++) {
		uint64_t other = random_below(i + 1);

		order[i] = order[other];
		order[other] = (uint32_t)i;
	}
	for (uint64_t i = 0; i < give / PAGE; i++)
		if (madvise(memory + (2 * (uint64_t)order[i] + 1) * PAGE, PAGE, MADV_DONTNEED) < 0)
			die("give back");
	if (open(argv[3], O_WRONLY | O_CREAT | O_EXCL, 0600) < 0)
		die(argv[3]);
	for (;;)
		pause();
}
