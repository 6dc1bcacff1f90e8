/*
 * Hold a VM by SIGSTOP, where ptrace is not permitted.
 *
 * A parent may react with SIGCONT, as shells, tmux and screen do for a child on
 * their terminal: a QEMU with a terminal is refused. A hold is valid only if at
 * its end every thread is still stopped and has the same number of context
 * switches as at its start, so that it cannot have run in between.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tracer.h"

#define POLL_NS 50000

static int send_to_qemu(struct tracer *tracer, int number)
{
	return syscall(SYS_pidfd_send_signal, tracer->hold->qemu, number, NULL, 0) ? errno : 0;
}

static uint64_t switches_of(int tasks, pid_t tid)
{
	return (uint64_t)proc_status(tasks, tid, "\nvoluntary_ctxt_switches:") +
	       (uint64_t)proc_status(tasks, tid, "nonvoluntary_ctxt_switches:");
}

/* Record all threads: HOLD_DONE if all are stopped, HOLD_STUCK if some run. */
static enum hold_result look(struct tracer *tracer)
{
	static pid_t tids[MAX_THREADS];
	int tasks = tracer->hold->tasks;
	int count = proc_threads(tasks, tids, MAX_THREADS);
	struct proc_stat stat;

	tracer->count = 0;
	if (count <= 0)
		return HOLD_GONE;
	if (count > MAX_THREADS)
		return HOLD_CROWDED;
	for (int i = 0; i < count; i++) {
		struct thread *thread = &tracer->threads[tracer->count];

		if (!proc_stat(tasks, tids[i], &stat) || proc_dead(&stat) || proc_worker(&stat))
			continue;
		tracer->page->who = tids[i];
		if (stat.state == 't') { /* its tracer may let it run at any moment */
			tracer->page->who = (int32_t)proc_status(tasks, tids[i], "TracerPid:");
			return HOLD_TRACED;
		}
		if (stat.state != 'T')
			return HOLD_STUCK;
		memset(thread, 0, sizeof(*thread));
		thread->tid = tids[i];
		thread->switches = switches_of(tasks, tids[i]);
		tracer->count++;
	}
	/* As in tracees.c: the list may be incomplete. */
	if (!proc_stat(tasks, tracer->hold->pid, &stat) || (stat.state == 'Z' && stat.threads == 1))
		return HOLD_GONE;
	return stat.threads == count ? HOLD_DONE : HOLD_STUCK;
}

static bool has_run(struct tracer *tracer)
{
	static struct thread before[MAX_THREADS];
	int count = tracer->count;

	memcpy(before, tracer->threads, (size_t)count * sizeof(*before));
	if (look(tracer) != HOLD_DONE || tracer->count != count)
		return true;
	for (int i = 0; i < count; i++)
		if (before[i].tid != tracer->threads[i].tid ||
		    before[i].switches != tracer->threads[i].switches)
			return true;
	return false;
}

enum hold_result sigstop_stop(struct tracer *tracer, int64_t deadline)
{
	enum hold_result result;
	struct proc_stat stat;
	int error;

	if (!proc_stat(tracer->hold->tasks, tracer->hold->pid, &stat))
		return HOLD_GONE;
	error = send_to_qemu(tracer, 0);
	if (error)
		return error == ESRCH ? HOLD_GONE : HOLD_FORBIDDEN;
	if (stat.tty)
		return HOLD_TERMINAL;
	if (send_to_qemu(tracer, SIGSTOP))
		return HOLD_GONE;
	while ((result = look(tracer)) == HOLD_STUCK && hold_now() < deadline)
		tracer_nap(POLL_NS);
	/* A thread's state is T a moment before the thread leaves its CPU. */
	while (result == HOLD_DONE && has_run(tracer)) {
		tracer_nap(POLL_NS);
		if (hold_now() > deadline)
			result = HOLD_STUCK;
	}
	if (result != HOLD_DONE)
		send_to_qemu(tracer, SIGCONT);
	return result;
}

enum hold_result sigstop_let_go(struct tracer *tracer)
{
	enum hold_result result = has_run(tracer) ? HOLD_RAN : HOLD_DONE;

	return send_to_qemu(tracer, SIGCONT) == ESRCH ? HOLD_GONE : result;
}
