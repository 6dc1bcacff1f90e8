/*
 * stacks: a main stack that has grown deep, areas that grow downwards, alternate signal stacks,
 * coroutines on stacks of their own with guard pages.
 */
#include "check.h"

#include <alloca.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <ucontext.h>
#include <unistd.h>

#define FRAME_PAGES 4
#define FRAMES 160 /* 2.5 MiB */
#define COROUTINES 24
#define COROUTINE_STACK (128 << 10)
#define GROWING 3
#define STACK_GUARD_GAP 256 /* pages; stack_guard_gap in mm/mmap.c */

static struct pages frames[FRAMES], altstack_pages, growing[GROWING], plain;
static char *altstack;
static volatile bool on_altstack;

static struct coroutine {
	ucontext_t context;
	char *stack;
	struct pages data;
	unsigned round, done;
	int number;
} coroutines[COROUTINES];
static ucontext_t scheduler;

/* --- the main stack: frames of a deep recursion, and we stay at its bottom --- */

/* Never inlined, and each frame is used after the call: they all stay. */
#pragma GCC diagnostic ignored "-Winfinite-recursion" /* serve_root never returns */
static __attribute__((noinline)) void descend(int depth)
{
	char frame[FRAME_PAGES * PAGE] __attribute__((aligned(4096)));

	pages_at(&frames[depth], "main stack", frame, sizeof(frame));
	pages_write(&frames[depth], 0, FRAME_PAGES, 1 + depth, FIRST);
	if (depth % 40 == 3)
		pages_target(&frames[depth]);
	if (depth + 1 == FRAMES)
		serve_root();
	descend(depth + 1);
	__asm__ volatile("" ::"r"(frame) : "memory");
}

/* Ever deeper: the kernel has to grow the stack further. */
static __attribute__((noinline)) size_t grow(size_t depth)
{
	volatile char frame[PAGE];
	size_t wrong = 0;

	for (size_t i = 0; i < PAGE; i++)
		frame[i] = (char)mix(depth * PAGE + i);
	if (depth)
		wrong = grow(depth - 1);
	for (size_t i = 0; i < PAGE; i++)
		wrong += frame[i] != (char)mix(depth * PAGE + i);
	return wrong;
}

/* --- alternate signal stack --- */

static void handle(int signal_number)
{
	char here;

	(void)signal_number;
	on_altstack = &here >= altstack && &here < altstack + 16 * PAGE;
}

static void make_altstack(void)
{
	struct sigaction action = {.sa_handler = handle, .sa_flags = SA_ONSTACK};
	stack_t stack = {.ss_size = 16 * PAGE};

	altstack = map_anonymous(18 * PAGE, PROT_READ | PROT_WRITE, 0);
	check(mprotect(altstack, PAGE, PROT_NONE), "mprotect");
	check(mprotect(altstack + 17 * PAGE, PAGE, PROT_NONE), "mprotect");
	altstack += PAGE;
	stack.ss_sp = altstack;
	check(sigaltstack(&stack, NULL), "sigaltstack");
	check(sigaction(SIGUSR2, &action, NULL), "sigaction");
	/* The lower half is never reached by a frame. */
	pages_at(&altstack_pages, "altstack", altstack, 8 * PAGE);
	pages_write(&altstack_pages, 0, 6, 1, FIRST);
	pages_target(&altstack_pages);
}

static void check_altstack(void)
{
	stack_t stack;

	sigaltstack(NULL, &stack);
	expect(stack.ss_sp == altstack && stack.ss_size == 16 * PAGE, "altstack: at %p",
	       stack.ss_sp);
	on_altstack = false;
	raise(SIGUSR2);
	expect(on_altstack, "the handler does not run on the alternate stack");
	pages_check(&altstack_pages);
	expect(!readable(altstack - 1) && !readable(altstack + 16 * PAGE), "altstack: no guards");
}

/* --- areas that grow downwards --- */

static void make_growing(void)
{
	for (int i = 0; i < GROWING; i++) {
		size_t pages = 100 + 20 * i, free = (pages + STACK_GUARD_GAP - 1) * PAGE;
		char *room = map_anonymous(4 * MIB, PROT_NONE, MAP_NORESERVE);
		char *start = room + 3 * MIB;

		/*
		 * The kernel lets it grow only where nothing that can be accessed is nearer than
		 * the gap: what is left free below is too small for anybody else's mapping.
		 */
		check(munmap(start + PAGE - free, free - PAGE), "munmap");
		if (mmap(start, 4 * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED, -1, 0) != start)
			die("MAP_GROWSDOWN");
		/* Grown page by page, as a stack does. */
		for (size_t page = 0; page < pages; page++)
			*(volatile char *)(start - page * PAGE) = 1;
		pages_at(&growing[i], "growing", start - (pages - 1) * PAGE, pages * PAGE);
		pages_write(&growing[i], 0, growing[i].count, 1 + i, FIRST);
		pages_target(&growing[i]);
	}
}

static void check_growing(unsigned round)
{
	for (int i = 0; i < GROWING; i++) {
		pages_check(&growing[i]);
		if (round)
			pages_renew(&growing[i], 1 + i, round);
	}
	if (!round || round > 100)
		return;
	/* It still grows, and what comes is zero. */
	for (int page = 0; page < 2; page++) {
		char *below = growing[0].start - (2 * round + page - 1) * PAGE;

		expect(is_zero(below), "growing: what it grows by is not zero");
		*(volatile char *)below = 1;
		*(volatile char *)below = 0;
	}
}

/* --- coroutines --- */

static void run_coroutine(int number)
{
	struct coroutine *self = &coroutines[number];
	char bytes[12 * PAGE] __attribute__((aligned(4096)));

	pages_at(&self->data, "coroutine", bytes, sizeof(bytes));
	pages_write(&self->data, 0, 12, 1 + number, FIRST);
	if (number % 8 == 0)
		pages_target(&self->data);
	for (;;) {
		swapcontext(&self->context, &scheduler);
		if (pages_check(&self->data))
			pages_renew(&self->data, 1 + number, self->round);
		self->done = self->round;
	}
}

static void make_coroutines(void)
{
	for (int i = 0; i < COROUTINES; i++) {
		struct coroutine *self = &coroutines[i];
		size_t size = COROUTINE_STACK + 2 * PAGE;

		self->number = i;
		self->stack = map_anonymous(size, PROT_READ | PROT_WRITE, MAP_STACK);
		check(mprotect(self->stack, PAGE, PROT_NONE), "guard");
		check(mprotect(self->stack + size - PAGE, PAGE, PROT_NONE), "guard");
		getcontext(&self->context);
		self->context.uc_stack.ss_sp = self->stack + PAGE;
		self->context.uc_stack.ss_size = COROUTINE_STACK;
		makecontext(&self->context, (void (*)(void))run_coroutine, 1, i);
		swapcontext(&scheduler, &self->context);
	}
}

static void run_coroutines(unsigned round)
{
	for (int i = 0; i < COROUTINES; i++) {
		struct coroutine *self = &coroutines[i];

		self->round = round;
		swapcontext(&scheduler, &self->context);
		expect(self->done == round, "coroutine %d did not run", i);
		expect(!readable(self->stack) && !readable(self->stack + COROUTINE_STACK + PAGE),
		       "coroutine %d has no guards", i);
	}
}

/* --- all --- */

static void *run_thread(void *unused)
{
	(void)unused;
	expect(grow(20) == 0, "a new thread's stack");
	return NULL;
}

void answer(unsigned round)
{
	pthread_t id;

	for (int depth = 0; depth < FRAMES; depth++)
		pages_check(&frames[depth]);
	pages_check(&plain);
	check_growing(0);
	check_altstack();
	if (!all_right())
		return;
	run_coroutines(round);
	for (int depth = 0; depth < FRAMES; depth++)
		pages_renew(&frames[depth], 1 + depth, round);
	pages_renew(&plain, 1, round);
	check_growing(round);
	expect(grow(10 * round % 400) == 0, "what the main stack has grown by");
	if (!pthread_create(&id, NULL, run_thread, NULL))
		pthread_join(id, NULL);
	else
		expect(false, "pthread_create");
	for (int depth = 0; depth < FRAMES; depth++)
		pages_check(&frames[depth]);
}

void set_up(void)
{
	pages_new(&plain, "plain", 6 * MIB);
	pages_write_every(&plain, 0, 2, 1, FIRST);
	pages_target(&plain);
	make_altstack();
	make_growing();
	make_coroutines();
	descend(0);
}
