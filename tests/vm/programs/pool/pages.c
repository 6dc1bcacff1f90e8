/* Pages with known content; see check.h. */
#include "check.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define WORDS (PAGE / 8)

uint64_t mix(uint64_t value)
{
	value += 0x9e3779b97f4a7c15;
	value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
	value = (value ^ value >> 27) * 0x94d049bb133111eb;
	return value ^ value >> 31;
}

static uint64_t seed_of(const char *name)
{
	uint64_t seed = 0;

	while (*name)
		seed = mix(seed ^ (unsigned char)*name++);
	return seed;
}

static uint64_t next_word(uint64_t word)
{
	return word * 6364136223846793005 + 1442695040888963407;
}

void fill(void *page, uint64_t key)
{
	uint64_t *words = page;

	for (size_t i = 0; i < WORDS; i++)
		words[i] = key = next_word(key);
}

/* The first word that is not as generated, or WORDS. `flip` is the place of an inverted byte. */
static size_t first_wrong(const void *page, uint64_t key, unsigned flip)
{
	const uint64_t *words = page;

	for (size_t i = 0; i < WORDS; i++) {
		uint64_t wanted = key = next_word(key);

		if (flip && i == flip / 8)
			wanted ^= 0xffULL << 8 * (flip % 8);
		if (words[i] != wanted)
			return i;
	}
	return WORDS;
}

bool is_zero(const void *page)
{
	const uint64_t *words = page;

	for (size_t i = 0; i < WORDS; i++)
		if (words[i])
			return false;
	return true;
}

static uint64_t key_of(const struct pages *pages, size_t page, const struct content *content)
{
	uint64_t who = (uint64_t)content->writer << 16 | content->generation;

	if (content->generation == FILED)
		return file_key(pages->file, pages->file_page + page);
	return mix(pages->seed ^ mix(page ^ mix(who)));
}

static char *address(const struct pages *pages, size_t page)
{
	return pages->start + page * PAGE;
}

/* --- areas --- */

void *map_anonymous(size_t size, int prot, int more_flags)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS;
	void *start;

	if (more_flags & MAP_SHARED)
		flags &= ~MAP_PRIVATE;
	start = mmap(NULL, size, prot, flags | more_flags, -1, 0);
	if (start == MAP_FAILED)
		die("mmap");
	return start;
}

void pages_at(struct pages *pages, const char *name, void *start, size_t size)
{
	size_t book = size / PAGE * sizeof(struct content);

	*pages = (struct pages){
		.name = name, .start = start, .count = size / PAGE, .seed = seed_of(name)};
	pages->book = map_anonymous((book + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE, 0);
	pages_note(pages, 0, pages->count, 0, ZERO);
}

void pages_new(struct pages *pages, const char *name, size_t size)
{
	char *start = map_anonymous(size + 2 * PAGE, PROT_NONE, MAP_NORESERVE);

	check(mprotect(start + PAGE, size, PROT_READ | PROT_WRITE), "mprotect");
	pages_at(pages, name, start + PAGE, size);
}

void pages_of_file(struct pages *pages, const char *name, const char *file, size_t first,
		   size_t count, int prot)
{
	int fd = open_file(file, O_RDONLY);
	void *start = mmap(NULL, count * PAGE, prot, MAP_PRIVATE, fd, first * PAGE);

	if (start == MAP_FAILED)
		die("mmap of a file");
	close(fd);
	pages_at(pages, name, start, count * PAGE);
	pages->file = file;
	pages->file_page = first;
	pages_note(pages, 0, count, 0, FILED);
}

void pages_note(struct pages *pages, size_t first, size_t count, uint32_t writer,
		unsigned generation)
{
	for (size_t page = first; page < first + count && page < pages->count; page++)
		pages->book[page] = (struct content){writer, generation, 0};
}

static void write_page(struct pages *pages, size_t page, uint32_t writer, unsigned generation)
{
	pages_note(pages, page, 1, writer, generation);
	fill(address(pages, page), key_of(pages, page, &pages->book[page]));
}

void pages_write(struct pages *pages, size_t first, size_t count, uint32_t writer,
		 unsigned generation)
{
	for (size_t page = first; page < first + count && page < pages->count; page++)
		write_page(pages, page, writer, generation);
}

void pages_write_every(struct pages *pages, size_t first, size_t step, uint32_t writer,
		       unsigned generation)
{
	for (size_t page = first; page < pages->count; page += step)
		if (pages->book[page].generation != GONE)
			write_page(pages, page, writer, generation);
}

void pages_flip(struct pages *pages, size_t page)
{
	struct content *content = &pages->book[page];

	if (content->generation < FIRST || content->flip)
		die("only a page as written can be flipped");
	content->flip = 1 + mix(page) % (PAGE - 1);
	address(pages, page)[content->flip] ^= 0xff;
}

unsigned generation_of(unsigned round)
{
	return FIRST + 1 + round % 60000;
}

void pages_renew(struct pages *pages, uint32_t writer, unsigned round)
{
	for (size_t page = 0; page < pages->count; page++)
		if (pages->book[page].generation >= FIRST && (page + round) % 5 == 0)
			write_page(pages, page, writer, generation_of(round));
}

/* --- checks --- */

bool page_check(const struct pages *pages, size_t page)
{
	const struct content *content = &pages->book[page];
	const uint64_t *words = (void *)address(pages, page);
	size_t wrong;

	if (content->generation == GONE)
		return true;
	if (content->generation == LOST)
		return expect(false, "%s: the book of page %zu is lost", pages->name, page);
	if (content->generation == ZERO)
		return expect(is_zero(words), "%s: page %zu at %p is not zero", pages->name, page,
			      (void *)words);
	wrong = first_wrong(words, key_of(pages, page, content), content->flip);
	if (wrong == WORDS)
		return expect(true, "%s", pages->name);
	return expect(false, "%s: page %zu at %p, word %zu is %#llx (pid %d, writer %u, gen %u)",
		      pages->name, page, (void *)words, wrong, (unsigned long long)words[wrong],
		      getpid(), content->writer, content->generation);
}

bool pages_check(const struct pages *pages)
{
	bool right = true;

	for (size_t page = 0; page < pages->count; page++)
		right &= page_check(pages, page);
	return right;
}

bool pages_check_closed(const struct pages *pages, int prot)
{
	size_t size = pages->count * PAGE;
	bool right;

	if (!expect(!mprotect(pages->start, size, PROT_READ), "%s: mprotect", pages->name))
		return false;
	right = pages_check(pages);
	return expect(!mprotect(pages->start, size, prot), "%s: mprotect", pages->name) && right;
}

void pages_target(const struct pages *pages)
{
	size_t first = pages->count, middle = pages->count, last = pages->count,
	       zero = pages->count;

	for (size_t page = 0; page < pages->count; page++) {
		unsigned generation = pages->book[page].generation;

		if (generation == ZERO)
			zero = page;
		if (generation < FIRST)
			continue;
		last = page;
		if (first == pages->count)
			first = page;
		if (middle == pages->count && page >= pages->count / 2)
			middle = page;
	}
	if (first < pages->count)
		target(address(pages, first) + mix(first) % PAGE, pages->name);
	if (middle < pages->count && middle != first)
		target(address(pages, middle) + mix(middle) % PAGE, pages->name);
	if (last < pages->count && last != first && last != middle)
		target(address(pages, last) + PAGE - 1, pages->name);
	if (zero < pages->count)
		target(address(pages, zero) + mix(zero) % PAGE, pages->name);
}

static int probe(void *address, bool write_there)
{
	int pipes[2], result = -1;
	char byte = 0;

	check(pipe2(pipes, O_CLOEXEC), "pipe");
	/* The byte that is written is the one that is there, so that nothing changes. */
	if (write(pipes[1], address, 1) == 1)
		result = write_there ? read(pipes[0], address, 1) : read(pipes[0], &byte, 1);
	close(pipes[0]);
	close(pipes[1]);
	return result;
}

bool readable(const void *address)
{
	return probe((void *)address, false) == 1;
}

bool writable(void *address)
{
	return probe(address, true) == 1;
}

/* --- files --- */

static void path_of(char *path, const char *name)
{
	if (snprintf(path, PATH_MAX, "%s/%s", directory, name) >= PATH_MAX)
		die("path");
}

uint64_t file_key(const char *name, size_t page)
{
	return mix(seed_of(name) ^ page);
}

void make_file(const char *name, size_t pages)
{
	static uint64_t page[WORDS];
	char path[PATH_MAX];
	int fd;

	path_of(path, name);
	fd = check(open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), path);
	for (size_t i = 0; i < pages; i++) {
		fill(page, file_key(name, i));
		if (write(fd, page, PAGE) != PAGE)
			die(path);
	}
	close(fd);
}

int open_file(const char *name, int flags)
{
	char path[PATH_MAX];

	path_of(path, name);
	return check(open(path, flags | O_CLOEXEC), path);
}
