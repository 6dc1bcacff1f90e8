/*
 * The tracer: holds QEMU at ovr's request, and releases it even if ovr dies or hangs.
 *
 * It is forked from a process with threads, so it only makes system calls and uses
 * memory. It watches ovr by a pidfd, which becomes readable when ovr's last thread
 * has exited: no thread of ovr can be copying when the VM resumes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "tracer.h"

#define GRACE_NS 1000000000 /* time for a writer to leave the gate */
#define NAP_NS 50000
#define STARVED_BOUNDS 4 /* extension of a hold whose writers get no CPU time, in bounds */

int64_t hold_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

void tracer_nap(int64_t ns)
{
	struct timespec wait = {.tv_nsec = ns};

	nanosleep(&wait, NULL);
}

static _Noreturn void leave(void)
{
	for (;;)
		syscall(SYS_exit_group, 0);
}

enum event { EVENT_ASKED, EVENT_ENDED, EVENT_TIME };

/* Wait for a request, for ovr's exit, or, unless it is -1, until `until`. */
static enum event await(const struct hold *hold, int64_t until)
{
	struct pollfd fds[] = {
		{.fd = hold->self, .events = POLLIN},
		{.fd = hold->ask, .events = POLLIN},
	};
	uint64_t count;

	for (;;) {
		int64_t left = until < 0 ? 0 : until - hold_now();
		struct timespec wait = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};

		if (left < 0)
			return EVENT_TIME;
		if (ppoll(fds, 2, until < 0 ? NULL : &wait, NULL) <= 0)
			continue;
		if (fds[0].revents)
			return EVENT_ENDED;
		if (read(hold->ask, &count, sizeof(count)) == sizeof(count))
			return EVENT_ASKED;
	}
}

static void answer(struct tracer *tracer, enum hold_result result)
{
	uint64_t one = 1;

	__atomic_store_n(&tracer->page->answer, (uint32_t)result, __ATOMIC_SEQ_CST);
	(void)!write(tracer->hold->told, &one, sizeof(one));
}

static enum hold_result stop(struct tracer *tracer)
{
	int64_t deadline = hold_now() + tracer->hold->patience_ns;
	enum hold_result result = HOLD_FORBIDDEN;

	if (tracer->page->way != HOLD_BY_SIGSTOP) {
		result = ptrace_stop(tracer, deadline);
		if (result == HOLD_DONE)
			tracer->page->way = HOLD_BY_PTRACE;
	}
	if (result == HOLD_FORBIDDEN && tracer->page->way != HOLD_BY_PTRACE && !tracer->spent) {
		result = sigstop_stop(tracer, deadline);
		if (result == HOLD_DONE)
			tracer->page->way = HOLD_BY_SIGSTOP;
	}
	return result;
}

static enum hold_result let_go(struct tracer *tracer)
{
	return tracer->page->way == HOLD_BY_PTRACE ? ptrace_let_go(tracer) : sigstop_let_go(tracer);
}

static void complain(const char *text)
{
	struct pollfd fd = {.fd = STDERR_FILENO, .events = POLLOUT};

	/* A terminal stopped by Ctrl-S would block. */
	if (poll(&fd, 1, 1000) > 0 && fd.revents & POLLOUT)
		(void)!write(STDERR_FILENO, text, strlen(text));
}

/* Wait for writers to leave the shut gate. Kills ovr and returns true if one stays inside. */
static bool drain(struct tracer *tracer)
{
	int64_t deadline = hold_now() + GRACE_NS;
	struct pollfd ended = {.fd = tracer->hold->self, .events = POLLIN};

	while (__atomic_load_n(&tracer->page->writers, __ATOMIC_SEQ_CST)) {
		if (poll(&ended, 1, 0) > 0)
			return false; /* a writer that died inside stays counted */
		if (hold_now() > deadline) {
			syscall(SYS_pidfd_send_signal, tracer->hold->self, SIGKILL, NULL, 0);
			while (poll(&ended, 1, -1) <= 0)
				;
			return true;
		}
		tracer_nap(NAP_NS);
	}
	return false;
}

static bool shut(struct tracer *tracer, uint32_t as)
{
	uint32_t open = (uint32_t)tracer->hold->tracer;

	return __atomic_compare_exchange_n(&tracer->page->gate, &open, as, false, __ATOMIC_SEQ_CST,
					   __ATOMIC_SEQ_CST);
}

/* Whether a thread of ovr is runnable: the host is busy, and the hold may be extended. */
static bool starved(const struct hold *hold)
{
	static pid_t tids[MAX_THREADS];
	int count = proc_threads(hold->own, tids, MAX_THREADS);
	struct proc_stat stat;

	for (int i = 0; i < count && i < MAX_THREADS; i++)
		if (proc_stat(hold->own, tids[i], &stat) && stat.state == 'R')
			return true;
	return false;
}

/* Wait until ovr ends the hold, exits, or exceeds the bound. */
static enum event await_end(const struct hold *hold)
{
	int64_t until = hold_now() + hold->bound_ns;
	int64_t last = until + STARVED_BOUNDS * hold->bound_ns;
	enum event event = await(hold, until);

	while (event == EVENT_TIME && until < last && starved(hold)) {
		until += hold->bound_ns / 4;
		event = await(hold, until);
	}
	return event;
}

/* Answer that the VM is held, wait for the end of the hold, and let the VM run. */
static void keep_held(struct tracer *tracer)
{
	const struct hold *hold = tracer->hold;
	enum hold_result result;
	enum event event;
	bool broken, killed;

	tracer->page->until = hold_now() + hold->bound_ns / 2;
	__atomic_fetch_add(&tracer->page->generation, 1, __ATOMIC_SEQ_CST);
	__atomic_store_n(&tracer->page->gate, (uint32_t)hold->tracer, __ATOMIC_SEQ_CST);
	answer(tracer, HOLD_DONE);
	event = await_end(hold);
	/* ovr shuts the gate before it asks for the end: then the hold is not broken. */
	broken = shut(tracer, event == EVENT_TIME ? GATE_BROKEN : GATE_SHUT) && event == EVENT_TIME;
	killed = drain(tracer);
	result = let_go(tracer);
	if (killed)
		complain("ovr: this process did not end a hold of the VM in time, and was killed; "
			 "the VM runs on, and the agent in the guest kills the half-restored "
			 "tree\n");
	if (killed || event == EVENT_ENDED)
		leave();
	if (event == EVENT_TIME && await(hold, -1) == EVENT_ENDED)
		leave();
	answer(tracer, broken && result == HOLD_DONE ? HOLD_BROKEN : result);
}

static void close_others(const struct hold *hold)
{
	int kept[] = {STDERR_FILENO, hold->qemu, hold->self, hold->tasks,
		      hold->own,     hold->ask,  hold->told};
	unsigned int from = 0;
	const size_t count = sizeof(kept) / sizeof(*kept);

	for (size_t i = 1; i < count; i++)
		for (size_t j = i; j && kept[j - 1] > kept[j]; j--) {
			int other = kept[j];

			kept[j] = kept[j - 1];
			kept[j - 1] = other;
		}
	for (size_t i = 0; i < count; i++) {
		if (from < (unsigned int)kept[i])
			syscall(SYS_close_range, from, kept[i] - 1, 0);
		from = (unsigned int)kept[i] + 1;
	}
	syscall(SYS_close_range, from, ~0u, 0);
}

static void own_gate(struct hold_page *page)
{
	page->robust.list.next = &page->futex;
	page->futex.next = &page->robust.list;
	page->robust.futex_offset =
		(long)offsetof(struct hold_page, gate) - (long)offsetof(struct hold_page, futex);
	page->robust.list_op_pending = NULL;
	syscall(SYS_set_robust_list, &page->robust, sizeof(page->robust));
}

/* The VM is stopped while the tracer waits for a CPU, and the tracer runs only for microseconds. */
static void hurry(void)
{
	struct sched_param first = {.sched_priority = 1};

	if (sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &first))
		setpriority(PRIO_PROCESS, 0, -20);
}

_Noreturn void tracer_main(struct hold *hold)
{
	static struct tracer tracer;
	struct sigaction standard = {.sa_handler = SIG_DFL};

	/* ovr has blocked all signals before the fork. */
	sigaction(SIGCHLD, &standard, NULL);
	setsid();
	(void)!chdir("/");
	prctl(PR_SET_NAME, "ovr-hold");
	prctl(PR_SET_TIMERSLACK, 1ul);
	hurry();
	close_others(hold);
	hold->tracer = (pid_t)syscall(SYS_gettid);
	tracer.hold = hold;
	tracer.page = hold->page;
	own_gate(hold->page);
	for (;;) {
		enum hold_result result;

		if (await(hold, -1) == EVENT_ENDED)
			leave();
		if (__atomic_load_n(&tracer.page->wish, __ATOMIC_SEQ_CST) != HOLD_WISH_HELD)
			leave();
		result = stop(&tracer);
		if (result == HOLD_DONE)
			keep_held(&tracer);
		else
			answer(&tracer, result);
		if (tracer.spent ||
		    __atomic_load_n(&tracer.page->wish, __ATOMIC_SEQ_CST) == HOLD_WISH_END)
			leave();
	}
}
