/*
 * Pages with known content, made to be checked fast and to be compressed well (they may be swapped
 * to zram), and to be merged by KSM if wanted: one page in eight is then one of sixteen that every
 * process has.
 */
#ifndef PATTERN_H
#define PATTERN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096UL
#define MIB (1UL << 20)
#define DIRECTORY "/tmp/ovr-subject"

/* The finalizer of splitmix64: every bit depends on every bit. */
static inline uint64_t mix(uint64_t z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
	return z ^ (z >> 31);
}

/* The content of a page: of the owner `whose`, the page's number, the number of the write. */
static inline uint64_t key_of(uint64_t whose, size_t page, uint64_t generation, bool mergeable)
{
	if (mergeable && page % 8 == 0)
		return mix(page / 8 % 16 + 1);
	return mix(mix(whose) + page) + mix(generation);
}

static inline void fill_page(uint64_t *words, uint64_t key)
{
	for (size_t i = 0; i < PAGE / sizeof(*words); i++)
		words[i] = key + i / 8;
}

static inline bool page_holds(const volatile uint64_t *words, uint64_t key)
{
	uint64_t differences = 0;

	for (size_t i = 0; i < PAGE / sizeof(*words); i++)
		differences |= words[i] ^ (key + i / 8);
	return !differences;
}

#endif
