/*
 * threads: many threads, each with checked data on its stack and in its TLS. Most wait for a futex;
 * some spin in a loop that lives in registers and the red zone; some run rseq critical sections
 * all the time; some call the vDSO.
 */
#include "check.h"
#include "rseq.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WAITERS 100
#define SPINNERS 4
#define COUNTERS 4
#define CLOCKS 2
#define THREADS (WAITERS + SPINNERS + COUNTERS + CLOCKS)
#define CPUS 64
#define STACK_PAGES 12
#define STACK_SIZE (256 << 10)

/* A loop's registers and red zone: what they hold from its start to its end. */
struct registers {
	uint64_t general[10];
	uint64_t red_zone[16];
	uint64_t xmm[15][2];
	volatile uint64_t turns;
	volatile uint64_t stop;
	uint64_t wrong; /* 1 + the number of the comparison that failed */
} __attribute__((aligned(16)));

struct thread {
	int number;
	uint32_t asked; /* a round; a futex */
	uint32_t answered;
	pthread_t id;
	struct registers registers;
	volatile uint64_t turns;
	uint64_t increments;
};

static struct thread threads[THREADS];
static struct pages common;
static volatile bool pause_counters;
static struct {
	uint64_t count;
	char padding[56];
} counters[CPUS] __attribute__((aligned(64)));

static __thread char tls_bytes[2 * PAGE] __attribute__((aligned(4096)));
static __thread uint64_t tls_zero[64];

/* --- a thread's own data --- */

struct stack_data {
	char bytes[STACK_PAGES * PAGE] __attribute__((aligned(4096)));
};

struct own {
	struct pages stack, tls;
};

static void make_own(struct own *own, struct stack_data *data, int number)
{
	pages_at(&own->stack, "stack", data->bytes, sizeof(data->bytes));
	pages_write(&own->stack, 0, STACK_PAGES, 1000 + number, FIRST);
	pages_at(&own->tls, "tls", tls_bytes, sizeof(tls_bytes));
	pages_write(&own->tls, 0, 2, 1000 + number, FIRST);
	if (number % 25 == 3) {
		pages_target(&own->stack);
		pages_target(&own->tls);
	}
}

static void forget_own(struct own *own)
{
	munmap(own->stack.book, PAGE);
	munmap(own->tls.book, PAGE);
}

static void check_own(struct own *own, int number, unsigned round)
{
	bool zero = true, stack, tls;

	for (size_t i = 0; i < sizeof(tls_zero) / sizeof(tls_zero[0]); i++)
		zero &= tls_zero[i] == 0;
	expect(zero, "tls of thread %d is not zero", number);
	check_rseq(number);
	stack = pages_check(&own->stack);
	tls = pages_check(&own->tls);
	if (!stack || !tls)
		return;
	pages_renew(&own->stack, 1000 + number, round);
	pages_renew(&own->tls, 1000 + number, round);
	pages_check(&own->stack);
}

/* --- spinning in registers --- */

#define GENERAL(n, reg) "mov 8*" #n "(%[r]), %%" #reg "\n\t"
#define GENERAL_CHECK(n, reg) "inc %%eax\n\tcmp 8*" #n "(%[r]), %%" #reg "\n\tjne 3f\n\t"
#define RED(n) "mov 80+8*" #n "(%[r]), %%rcx\n\tmov %%rcx, -8-8*" #n "(%%rsp)\n\t"
#define RED_CHECK(n)                                                                               \
	"inc %%eax\n\tmov -8-8*" #n "(%%rsp), %%rcx\n\tcmp 80+8*" #n "(%[r]), %%rcx\n\tjne 3f\n\t"
#define XMM(n) "movdqa 208+16*" #n "(%[r]), %%xmm" #n "\n\t"
#define XMM_CHECK(n)                                                                               \
	"inc %%eax\n\tmovdqa %%xmm" #n ", %%xmm15\n\tpcmpeqb 208+16*" #n "(%[r]), %%xmm15\n\t"     \
	"pmovmskb %%xmm15, %%ecx\n\tcmp $0xffff, %%ecx\n\tjne 3f\n\t"
#define ALL_GENERAL(x)                                                                             \
	x(0, rdx) x(1, rsi) x(2, r8) x(3, r9) x(4, r10) x(5, r11) x(6, r12) x(7, r13) x(8, r14)    \
		x(9, r15)
#define SIXTEEN(x)                                                                                 \
	x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11) x(12) x(13) x(14) x(15)
#define FIFTEEN(x) x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11) x(12) x(13) x(14)

_Static_assert(offsetof(struct registers, red_zone) == 80, "as the assembly has it");
_Static_assert(offsetof(struct registers, xmm) == 208, "as the assembly has it");

/* Naked in effect: no calls, and the compiler is told nothing of the red zone, so keep it ours. */
static __attribute__((noinline, target("no-avx"))) void spin(struct registers *r)
{
	uint64_t wrong = 0;

	__asm__ volatile(
		"lea -512(%%rsp), %%rsp\n\t" /* away from what the compiler has in its red zone */
		/* clang-format off */
		ALL_GENERAL(GENERAL) SIXTEEN(RED) FIFTEEN(XMM)
		"2:\n\txor %%eax, %%eax\n\t"
		ALL_GENERAL(GENERAL_CHECK) SIXTEEN(RED_CHECK) FIFTEEN(XMM_CHECK)
		/* clang-format on */
		"incq %c[turns](%[r])\n\t"
		"cmpq $0, %c[stop](%[r])\n\t"
		"je 2b\n\t"
		"xor %%eax, %%eax\n\t"
		"3:\n\tlea 512(%%rsp), %%rsp\n\t"
		: "=&a"(wrong)
		: [r] "D"(r), [turns] "i"(offsetof(struct registers, turns)),
		  [stop] "i"(offsetof(struct registers, stop))
		: "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0",
		  "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
		  "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "memory", "cc");
	r->wrong = wrong;
}

static void run_spinner(struct thread *self, unsigned round)
{
	struct registers *r = &self->registers;
	uint64_t *words = r->general;

	for (size_t i = 0; i < offsetof(struct registers, turns) / 8; i++)
		words[i] = mix(round * 1000 + self->number * 100000UL + i);
	r->stop = 0;
	spin(r);
	expect(r->wrong == 0, "spinner %d: register or red zone, comparison %lu after %lu turns",
	       self->number, (unsigned long)r->wrong, (unsigned long)r->turns);
}

/* --- counting with rseq --- */

static void run_counter(struct thread *self)
{
	for (;;) {
		for (int i = 0; i < 1000 && !pause_counters; i++)
			self->increments += rseq_add(&counters[0].count, sizeof(counters[0]), CPUS);
		self->turns++;
		if (pause_counters)
			return;
		check_rseq(self->number);
	}
}

/* --- asking the vDSO --- */

static uint64_t nanoseconds(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000UL + time.tv_nsec;
}

static void run_clock(struct thread *self)
{
	uint64_t last = nanoseconds(CLOCK_MONOTONIC);

	while (__atomic_load_n(&self->asked, __ATOMIC_ACQUIRE) == self->answered) {
		uint64_t now = nanoseconds(CLOCK_MONOTONIC);
		unsigned cpu = ~0U;

		if (now < last)
			expect(false, "the clock went back from %lu to %lu", (unsigned long)last,
			       (unsigned long)now);
		last = now;
		if (getcpu(&cpu, NULL) || cpu >= CPUS)
			expect(false, "getcpu says %u", cpu);
		nanoseconds(CLOCK_REALTIME);
		self->turns++;
	}
}

/* --- all of them --- */

static void wait_for_question(struct thread *self)
{
	while (__atomic_load_n(&self->asked, __ATOMIC_ACQUIRE) == self->answered)
		syscall(SYS_futex, &self->asked, FUTEX_WAIT_PRIVATE, self->answered, NULL, NULL, 0);
}

static void set_answered(struct thread *self)
{
	__atomic_store_n(&self->answered, self->asked, __ATOMIC_RELEASE);
	syscall(SYS_futex, &self->answered, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static void *run_thread(void *argument)
{
	struct thread *self = argument;
	struct stack_data data;
	struct own own;

	make_own(&own, &data, self->number);
	for (set_answered(self);;) {
		if (self->number < WAITERS)
			;
		else if (self->number < WAITERS + SPINNERS)
			run_spinner(self, self->asked);
		else if (self->number < WAITERS + SPINNERS + COUNTERS)
			run_counter(self);
		else
			run_clock(self);
		wait_for_question(self);
		check_own(&own, self->number, self->asked);
		set_answered(self);
		while (pause_counters && self->number >= WAITERS)
			usleep(1000);
	}
	return NULL;
}

static void *run_short(void *argument)
{
	struct stack_data data;
	struct own own;
	unsigned round = *(unsigned *)argument;

	expect(is_zero(tls_bytes), "tls of a new thread is not zero");
	make_own(&own, &data, 5000);
	check_own(&own, 5000, round);
	forget_own(&own);
	return NULL;
}

static void begin_thread(pthread_t *id, void *(*function)(void *), void *argument)
{
	pthread_attr_t attributes;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_SIZE);
	errno = pthread_create(id, &attributes, function, argument);
	if (errno)
		die("pthread_create");
}

static void ask_thread(struct thread *thread, unsigned round)
{
	__atomic_store_n(&thread->asked, round, __ATOMIC_RELEASE);
	syscall(SYS_futex, &thread->asked, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static bool hear_thread(struct thread *thread, unsigned round)
{
	struct timespec second = {1, 0};
	uint32_t seen;

	for (int i = 0; i < 60; i++) {
		seen = __atomic_load_n(&thread->answered, __ATOMIC_ACQUIRE);
		if (seen == round)
			return true;
		syscall(SYS_futex, &thread->answered, FUTEX_WAIT_PRIVATE, seen, &second, NULL, 0);
	}
	return expect(false, "thread %d does not answer", thread->number);
}

void set_up(void)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	pages_new(&common, "common", 4 * MIB);
	pages_write_every(&common, 0, 2, 1, FIRST);
	pages_target(&common);
	for (int i = 0; i < THREADS; i++) {
		threads[i].number = i;
		threads[i].asked = 1;
		begin_thread(&threads[i].id, run_thread, &threads[i]);
		hear_thread(&threads[i], 1);
	}
	target_once((char *)&threads[WAITERS].registers.general[3] + 5, "a register's twin");
	target_once((char *)&threads[WAITERS].registers.xmm[7][1] + 2, "an xmm register's twin");
	target_once(&counters[0].count, "a counter");
}

static void check_turns(uint64_t *before)
{
	for (int attempt = 0; attempt < 600; attempt++) {
		bool all_run = true;

		for (int i = WAITERS; i < THREADS; i++)
			all_run &= threads[i].turns + threads[i].registers.turns != before[i];
		if (all_run)
			break;
		usleep(50000);
	}
	for (int i = WAITERS; i < THREADS; i++)
		expect(threads[i].turns + threads[i].registers.turns != before[i],
		       "thread %d does not run", i);
}

static void check_counters(void)
{
	uint64_t sum = 0, wanted = 0;

	for (int i = 0; i < CPUS; i++)
		sum += counters[i].count;
	for (int i = 0; i < THREADS; i++)
		wanted += threads[i].increments;
	expect(sum == wanted, "rseq: %lu counted, %lu done", (unsigned long)sum,
	       (unsigned long)wanted);
	expect(wanted, "rseq: nothing done");
}

void answer(unsigned round)
{
	unsigned turn = round + 1; /* they have been asked once already */
	uint64_t before[THREADS];
	pthread_t id;

	for (int i = WAITERS; i < THREADS; i++)
		before[i] = threads[i].turns + threads[i].registers.turns;
	check_turns(before);
	pause_counters = true;
	for (int i = 0; i < THREADS; i++)
		threads[i].registers.stop = 1;
	for (int i = 0; i < THREADS; i++)
		ask_thread(&threads[i], turn);
	for (int i = 0; i < THREADS; i++)
		hear_thread(&threads[i], turn);
	check_counters();
	pause_counters = false;
	check_rseq(-1);
	if (!pages_check(&common))
		return;
	pages_renew(&common, 1, round);
	begin_thread(&id, run_short, &round);
	pthread_join(id, NULL);
}
