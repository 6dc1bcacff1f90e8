/*
 * Shared by the programs of the pool: a protocol, pages with known content, a family.
 *
 *     PROGRAM DIR [WORD…]         the workload; "surroundings": checks that they stay as they are
 *     PROGRAM --prepare DIR       make the files that it maps
 *     PROGRAM --poke PID ADDRESS  invert a byte of another process: sabotage, to be noticed
 *
 * The workload sets everything up, writes DIR/targets (places that may be sabotaged: a line
 * "PID ADDRESS what" each, "!what" for those that cannot be made right again) and DIR/ready (the root's pid as it sees it). At each SIGUSR1 to the
 * root, all processes and threads check all that they have, do new work and check again; the root
 * writes DIR/answer: {"ok": bool, "checks": N, "round": N, "wrong": ["what", …]}.
 *
 * The content of a page follows from what it is, who wrote it and when: a page that is lost, old,
 * in a wrong place or somebody else's is seen. A process that finds something wrong does no new
 * work, so that a sabotage that is taken back leaves no trace.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096UL
#define MIB (1UL << 20)
#define ANY_PROT (-1)

/* --- what each program has --- */

extern const char *directory;

void prepare(void); /* files that are mapped; a program that maps none has no such function */
void set_up(void);  /* in the root */
void answer(unsigned round); /* in the root: check all, work, check again; rounds count from 1 */

bool has_argument(const char *word);

/*
 * Say that we are ready, and answer for ever. Done after `set_up`, unless that does it itself to be
 * deep in its stack meanwhile.
 */
void serve_root(void) __attribute__((noreturn));

/* --- findings --- */

void die(const char *what) __attribute__((noreturn));
long check(long result, const char *what); /* dies of a negative result */

/* Count a check, and note what is wrong if it is not `right`. Any thread may. Returns `right`. */
bool expect(bool right, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* An error is reported in every later round: for threads that check all the time. */
void remember_findings(void);
bool all_right(void); /* so far in this round, in this process and the children it asked */

/* A place whose sabotage must be noticed; and one where it cannot be taken back. */
void target(const void *address, const char *what);
void target_once(const void *address, const char *what);

/* --- pages --- */

enum {
	LOST,  /* no page is ever this: the book itself is lost */
	ZERO,  /* reads zero, touched or not */
	GONE,  /* not mapped */
	FILED, /* as in the file that is mapped */
	FIRST, /* written; further generations follow */
};

/* Content of a page: generated for `writer` and `generation`, one byte inverted if `flip`. */
struct content {
	uint32_t writer;
	uint16_t generation;
	uint16_t flip;
};

struct pages {
	const char *name;
	char *start;
	size_t count;
	uint64_t seed;
	struct content *book;
	const char *file; /* of what is mapped, if it is a file */
	size_t file_page; /* and where in it the area starts */
};

uint64_t mix(uint64_t value);
void *map_anonymous(size_t size, int prot, int more_flags);

/* Map a part of a file made with `make_file`. */
void pages_of_file(struct pages *pages, const char *name, const char *file, size_t first,
		   size_t count, int prot);
/* Take an area, all zero as yet. Its book is a mapping of its own. */
void pages_at(struct pages *pages, const char *name, void *start, size_t size);
/* The same on new private anonymous memory, with PROT_NONE around it so that it stays one area. */
void pages_new(struct pages *pages, const char *name, size_t size);

/* Write pages as `writer`, and note it. */
void pages_write(struct pages *pages, size_t first, size_t count, uint32_t writer,
		 unsigned generation);
/* Write every `step`th page from `first` on. */
void pages_write_every(struct pages *pages, size_t first, size_t step, uint32_t writer,
		       unsigned generation);
/* Note only: somebody else has written (or zeroed) them. */
void pages_note(struct pages *pages, size_t first, size_t count, uint32_t writer,
		unsigned generation);
/* Invert one byte in a written page. */
void pages_flip(struct pages *pages, size_t page);
bool pages_check(const struct pages *pages);
bool page_check(const struct pages *pages, size_t page);
/* Check while the protection is PROT_READ, then `prot` again. */
bool pages_check_closed(const struct pages *pages, int prot);
/* As new work: write a part of the pages that are written already, another part in each round. */
void pages_renew(struct pages *pages, uint32_t writer, unsigned round);
unsigned generation_of(unsigned round);
/* Sabotage targets: the first written page, one in the middle, the last, and a zero page. */
void pages_target(const struct pages *pages);

void fill(void *page, uint64_t key);
bool is_zero(const void *page);

/* Whether the kernel may read or write there for us. */
bool readable(const void *address);
bool writable(void *address);

/* --- the family: processes that answer for themselves --- */

#define CHILDREN 64

struct child {
	pid_t pid;
	int fd;
};

extern struct child children[CHILDREN];
extern int child_count;

/*
 * Fork a child that calls `begin(number)` and then `serve(round, phase)` whenever it is asked.
 * Returns once `begin` has returned there. It ends when its parent does.
 */
int start_child(int number, void (*begin)(int number), void (*serve)(unsigned, unsigned));
/* Ask children, at once or one, and take over what they find. */
void ask_children(unsigned round, unsigned phase);
void ask_child(int index, unsigned round, unsigned phase);
/* Fork, have the child check something, and take over what it finds; it is gone afterwards. */
void in_new_child(void (*look)(unsigned), unsigned round);

/* --- what it sees of its namespaces: surroundings.c --- */

void surroundings_note(void);
void surroundings_check(void);

/* --- files --- */

/* Make a file of `size` bytes, its pages with content that `pages_at` and `file_key` know. */
void make_file(const char *name, size_t pages);
uint64_t file_key(const char *name, size_t page);
int open_file(const char *name, int flags);
void publish(const char *name, const char *text, size_t size);

#endif
