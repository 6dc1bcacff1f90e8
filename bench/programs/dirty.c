/*
 * A process that writes to its memory at a steady rate: a word of one page after the other.
 *
 *	bench-dirty READY BYTES BYTES_PER_SECOND
 *
 * It leaves its pid in READY when all of its memory was written once.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define TICK_NS 10000000l

int main(int argc, char **argv)
{
	const struct timespec tick = {.tv_nsec = TICK_NS};
	volatile uint64_t *words;
	size_t size, pages;
	FILE *ready;

	if (argc != 4)
		return 2;
	size = strtoull(argv[2], NULL, 10);
	pages = strtoull(argv[3], NULL, 10) / PAGE / (1000000000l / TICK_NS);
	if (size < PAGE)
		return 2;
	words = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (words == MAP_FAILED)
		return 2;
	for (size_t at = 0; at < size; at += 8)
		words[at / 8] = at;
	ready = fopen(argv[1], "w");
	if (!ready || fprintf(ready, "%d", getpid()) < 0 || fclose(ready))
		return 2;
	for (size_t at = 0;;) {
		for (size_t i = 0; i < pages; i++, at = (at + PAGE) % size)
			words[at / 8]++;
		nanosleep(&tick, NULL);
	}
}
