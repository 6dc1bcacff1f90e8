/*
 * stress: processes whose threads never rest: they change and check memory, pass messages through
 * pipes, take turns with futexes, get signals from timers, count with rseq, ask the vDSO. Whatever
 * is ever wrong is remembered.
 */
#include "check.h"
#include "rseq.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define CHILDREN_HERE 3
#define WRITERS 2
#define CPUS 64
#define LETTER 512 /* bytes in a pipe's message */

enum role { WRITER_0, WRITER_1, SENDER, RECEIVER, PING, PONG, COUNTER_0, COUNTER_1, CLOCK, ROLES };

static struct pages areas[WRITERS], still;
static volatile uint64_t turns[ROLES];
static volatile uint64_t alarms;
static volatile sig_atomic_t alarm_wrong;
static int number, letters[2];
static uint64_t increments[2];
static volatile unsigned stop, stopped; /* the counters, for a moment */
static struct {
	uint64_t count;
	char padding[56];
} counters[CPUS] __attribute__((aligned(64)));

static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	uint64_t ball, hits;
} game = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0, 0};

/* --- what each thread does, once --- */

/* Take any page, check it, write it anew; now and then give one back. */
static void write_some(int role, uint64_t turn)
{
	struct pages *pages = &areas[role];
	size_t page = mix(turn * 7 + role + 100 * number) % pages->count;

	page_check(pages, page);
	if (turn % 64 == 63) {
		madvise(pages->start + page * PAGE, PAGE, MADV_DONTNEED);
		pages_note(pages, page, 1, 0, ZERO);
	} else {
		pages_write(pages, page, 1, 10 * number + role, FIRST + turn % 60000);
	}
}

static void send_letter(uint64_t turn)
{
	uint64_t words[LETTER / 8];

	for (size_t i = 0; i < LETTER / 8; i++)
		words[i] = mix(turn * 1000 + i);
	while (write(letters[1], words, LETTER) != LETTER)
		if (errno != EINTR)
			expect(false, "a pipe takes no letter");
}

static void receive_letter(uint64_t turn)
{
	uint64_t words[LETTER / 8];
	char *at = (char *)words;

	for (size_t left = LETTER; left;) {
		ssize_t got = read(letters[0], at, left);

		if (got <= 0 && errno != EINTR)
			expect(false, "a pipe gives no letter");
		if (got > 0) {
			at += got;
			left -= got;
		}
	}
	for (size_t i = 0; i < LETTER / 8; i++)
		if (words[i] != mix(turn * 1000 + i)) {
			expect(false, "letter %lu is wrong", (unsigned long)turn);
			break;
		}
}

/* Two threads take turns: an even ball is for PING, an odd one for PONG. */
static void hit(int role)
{
	pthread_mutex_lock(&game.lock);
	while (game.ball % 2 != (unsigned)(role - PING))
		pthread_cond_wait(&game.changed, &game.lock);
	if (game.ball != game.hits)
		expect(false, "ball %lu, hits %lu", (unsigned long)game.ball,
		       (unsigned long)game.hits);
	game.ball++;
	game.hits++;
	pthread_cond_signal(&game.changed);
	pthread_mutex_unlock(&game.lock);
}

static void count(int role)
{
	for (int i = 0; i < 200; i++)
		increments[role - COUNTER_0] +=
			rseq_add(&counters[0].count, sizeof(counters[0]), CPUS);
	check_rseq(role);
	if (!stop)
		return;
	__atomic_fetch_add(&stopped, 1, __ATOMIC_SEQ_CST);
	while (stop)
		usleep(200);
	__atomic_fetch_sub(&stopped, 1, __ATOMIC_SEQ_CST);
}

static void look_at_clock(void)
{
	static struct timespec last;
	struct timespec now;
	unsigned cpu = ~0U;

	clock_gettime(CLOCK_MONOTONIC, &now);
	if (now.tv_sec < last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec))
		expect(false, "the clock goes back from %ld.%09ld to %ld.%09ld", last.tv_sec,
		       last.tv_nsec, now.tv_sec, now.tv_nsec);
	last = now;
	if (getcpu(&cpu, NULL) || cpu >= CPUS)
		expect(false, "getcpu says %u", cpu);
}

static void *run(void *argument)
{
	int role = (int)(intptr_t)argument;

	for (uint64_t turn = 0;; turn++) {
		if (role <= WRITER_1)
			write_some(role, turn);
		else if (role == SENDER)
			send_letter(turn);
		else if (role == RECEIVER)
			receive_letter(turn);
		else if (role <= PONG)
			hit(role);
		else if (role <= COUNTER_1)
			count(role);
		else
			look_at_clock();
		turns[role]++;
	}
	return NULL;
}

/* Runs on a frame that the kernel puts on whatever thread's stack. */
static void handle_alarm(int signal_number, siginfo_t *info, void *context)
{
	uint64_t seed = __atomic_add_fetch(&alarms, 1, __ATOMIC_RELAXED);
	volatile uint64_t frame[64];

	(void)context;
	for (int i = 0; i < 64; i++)
		frame[i] = mix(seed + i);
	for (int i = 0; i < 64; i++)
		if (frame[i] != mix(seed + i))
			alarm_wrong = 1;
	if (signal_number != info->si_signo)
		alarm_wrong = 2;
}

/* --- a process --- */

static void begin(int which)
{
	struct sigaction action = {.sa_sigaction = handle_alarm,
				   .sa_flags = SA_SIGINFO | SA_RESTART};
	struct itimerval every = {{0, 20000}, {0, 20000}};
	sigset_t alarm_only, old;
	pthread_t id;

	number = which;
	check(pipe(letters), "pipe");
	pages_new(&still, "still", 2 * MIB);
	pages_write_every(&still, 0, 2, which, FIRST);
	for (int i = 0; i < WRITERS; i++) {
		pages_new(&areas[i], "busy", 2 * MIB);
		pages_write_every(&areas[i], 0, 2, 10 * which + i, FIRST);
	}
	target_once(still.start + 5, "a page at rest");
	sigemptyset(&action.sa_mask);
	check(sigaction(SIGALRM, &action, NULL), "sigaction");
	/* Only a thread that never blocks in the kernel for long is interrupted: the clock's. */
	sigemptyset(&alarm_only);
	sigaddset(&alarm_only, SIGALRM);
	pthread_sigmask(SIG_BLOCK, &alarm_only, &old);
	for (intptr_t role = 0; role < ROLES; role++) {
		if (role == CLOCK || role == WRITER_1)
			pthread_sigmask(SIG_UNBLOCK, &alarm_only, NULL);
		errno = pthread_create(&id, NULL, run, (void *)role);
		if (errno)
			die("pthread_create");
		pthread_sigmask(SIG_BLOCK, &alarm_only, NULL);
	}
	check(setitimer(ITIMER_REAL, &every, NULL), "setitimer");
}

/* Everyone must have got on, twice: once may be the turn that was under way. */
static void check_turns(void)
{
	uint64_t before[ROLES], alarms_before = alarms;
	bool all_on = false;

	for (int role = 0; role < ROLES; role++)
		before[role] = turns[role];
	for (int attempt = 0; attempt < 1200 && !all_on; attempt++) {
		usleep(50000);
		all_on = alarms >= alarms_before + 2;
		for (int role = 0; role < ROLES; role++)
			all_on &= turns[role] >= before[role] + 2;
	}
	for (int role = 0; role < ROLES; role++)
		expect(turns[role] >= before[role] + 2, "process %d: role %d does not get on",
		       number, role);
	expect(alarms >= alarms_before + 2, "process %d: the timer is silent", number);
	expect(!alarm_wrong, "process %d: a signal handler went wrong (%d)", number, alarm_wrong);
}

static void check_counters(void)
{
	uint64_t sum = 0;

	stop = 1;
	while (__atomic_load_n(&stopped, __ATOMIC_SEQ_CST) != 2)
		usleep(1000);
	for (int i = 0; i < CPUS; i++)
		sum += counters[i].count;
	expect(sum == increments[0] + increments[1], "rseq: %lu counted, %lu done",
	       (unsigned long)sum, (unsigned long)(increments[0] + increments[1]));
	stop = 0;
	while (__atomic_load_n(&stopped, __ATOMIC_SEQ_CST))
		usleep(1000);
}

static void serve(unsigned round, unsigned phase)
{
	(void)phase;
	check_turns();
	check_counters();
	if (pages_check(&still))
		pages_renew(&still, number, round);
}

static void check_in_new_child(unsigned round)
{
	(void)round;
	pages_check(&still);
}

void set_up(void)
{
	remember_findings();
	for (int which = 1; which <= CHILDREN_HERE; which++)
		start_child(which, begin, serve);
	begin(0);
}

void answer(unsigned round)
{
	ask_children(round, 0);
	serve(round, 0);
	in_new_child(check_in_new_child, round);
}
