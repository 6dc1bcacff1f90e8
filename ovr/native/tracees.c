/*
 * Hold a VM by ptrace: every thread of QEMU in a ptrace stop, seized anew for each hold.
 *
 * After PTRACE_INTERRUPT a thread in user mode or in a system call stops before it
 * returns to user mode. A thread in KVM_RUN is kicked out of the guest: the request
 * sets TIF_SIGPENDING and sends an IPI (signal_wake_up(), kick_process()),
 * and vcpu_enter_guest()/vcpu_run() leave with -EINTR when a signal is pending
 * (xfer_to_guest_mode_handle_work() in virt/, arch/x86/kvm/x86.c); on its way to user
 * mode the thread traps (get_signal(), do_jobctl_trap()). QEMU enters KVM_RUN again
 * when it runs on, as after any signal.
 *
 * waitid() leaves each stop unconsumed (WNOWAIT): a tracee about to receive a signal
 * keeps it in exit_code, and receives it when the tracer detaches or dies.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>

#include "tracer.h"

#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

static bool known(const struct tracer *tracer, pid_t tid)
{
	for (int i = 0; i < tracer->count; i++)
		if (tracer->threads[i].tid == tid)
			return true;
	return false;
}

static enum hold_result refused(struct tracer *tracer, pid_t tid)
{
	int tasks = tracer->hold->tasks;
	struct proc_stat stat;
	int64_t other;

	if (!proc_stat(tasks, tid, &stat) || proc_dead(&stat))
		return HOLD_DONE; /* it has just exited */
	other = proc_status(tasks, tid, "TracerPid:");
	tracer->page->who = (int32_t)other;
	return other > 0 ? HOLD_TRACED : HOLD_FORBIDDEN;
}

static enum hold_result seize(struct tracer *tracer, pid_t tid)
{
	struct thread *thread = &tracer->threads[tracer->count];
	struct proc_stat stat;

	if (!proc_stat(tracer->hold->tasks, tid, &stat) || proc_dead(&stat))
		return HOLD_DONE;
	memset(thread, 0, sizeof(*thread));
	thread->tid = tid;
	if (!proc_worker(&stat)) {
		if (ptrace(PTRACE_SEIZE, tid, NULL, NULL))
			return errno == ESRCH ? HOLD_DONE : refused(tracer, tid);
		thread->seized = true;
		ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
	}
	tracer->count++;
	return HOLD_DONE;
}

/* True if the thread has stopped or exited. */
static bool settled(struct thread *thread)
{
	siginfo_t info = {0};

	if (thread->stopped || !thread->seized)
		return true;
	if (waitid(P_PID, (id_t)thread->tid, &info,
		   WSTOPPED | WEXITED | WNOHANG | WNOWAIT | __WALL)) {
		thread->seized = errno != ECHILD;
		return !thread->seized;
	}
	if (!info.si_pid)
		return false;
	if (info.si_code != CLD_TRAPPED && info.si_code != CLD_STOPPED) {
		waitid(P_PID, (id_t)thread->tid, &info, WEXITED | WNOHANG | __WALL);
		thread->seized = false;
		return true;
	}
	thread->stopped = true;
	/* With an event: the interrupt or a group stop. Without one: a signal to be delivered. */
	thread->signal = info.si_status >> 8 ? 0 : info.si_status;
	return true;
}

/* Check all: a leader's exit is reported only after that of every other thread. */
static struct thread *unsettled(struct tracer *tracer)
{
	struct thread *first = NULL;

	for (int i = 0; i < tracer->count; i++)
		if (!settled(&tracer->threads[i]) && !first)
			first = &tracer->threads[i];
	return first;
}

static bool await_all(struct tracer *tracer, int64_t deadline)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	for (;;) {
		struct thread *first = unsettled(tracer);
		int64_t left = deadline - hold_now();
		struct timespec wait;

		if (!first)
			return true;
		if (left <= 0) {
			tracer->page->who = first->tid;
			return false;
		}
		/* Each stop sends SIGCHLD, which is blocked and taken here. */
		wait.tv_sec = left / 1000000000;
		wait.tv_nsec = left % 1000000000;
		sigtimedwait(&set, NULL, &wait);
	}
}

/* Seize new threads; set `all` if none was new and none was missed. */
static enum hold_result look(struct tracer *tracer, bool *all)
{
	static pid_t tids[MAX_THREADS];
	int count = proc_threads(tracer->hold->tasks, tids, MAX_THREADS);
	int before = tracer->count;
	struct proc_stat stat;

	*all = false;
	if (count <= 0)
		return HOLD_GONE;
	if (count > MAX_THREADS)
		return HOLD_CROWDED;
	for (int i = 0; i < count; i++) {
		enum hold_result result = HOLD_DONE;

		if (known(tracer, tids[i]))
			continue;
		if (tracer->count == MAX_THREADS)
			return HOLD_CROWDED;
		result = seize(tracer, tids[i]);
		if (result != HOLD_DONE)
			return result;
	}
	/* The list ends early if a thread exits while it is read (next_tid() in fs/proc/base.c). */
	if (!proc_stat(tracer->hold->tasks, tracer->hold->pid, &stat))
		return HOLD_GONE;
	if (stat.state == 'Z' && stat.threads == 1)
		return HOLD_GONE;
	*all = tracer->count == before && stat.threads == count;
	return HOLD_DONE;
}

/* Detach every seized thread once it has stopped: a running one cannot be detached. */
static void detach_all(struct tracer *tracer, int64_t deadline)
{
	bool left = false;

	await_all(tracer, deadline);
	for (int i = 0; i < tracer->count; i++) {
		struct thread *thread = &tracer->threads[i];

		if (!thread->seized)
			continue;
		if (thread->stopped &&
		    !ptrace(PTRACE_DETACH, thread->tid, NULL, (void *)(long)thread->signal)) {
			thread->seized = false;
			continue;
		}
		thread->stopped = false; /* it was killed: wait for its exit */
		left = true;
	}
	/* Otherwise the tracer exits, which detaches it. */
	if (left && !await_all(tracer, hold_now() + 1000000000))
		tracer->spent = true;
	tracer->count = 0;
}

enum hold_result ptrace_stop(struct tracer *tracer, int64_t deadline)
{
	bool all;

	tracer->count = 0;
	do {
		enum hold_result result = look(tracer, &all);

		if (result == HOLD_DONE && !await_all(tracer, deadline))
			result = HOLD_STUCK;
		if (result == HOLD_DONE && !all && hold_now() > deadline) {
			tracer->page->who = tracer->hold->pid;
			result = HOLD_STUCK;
		}
		if (result != HOLD_DONE) {
			int32_t who = tracer->page->who;

			detach_all(tracer, deadline);
			tracer->page->who = who;
			return result;
		}
	} while (!all);
	return HOLD_DONE;
}

enum hold_result ptrace_let_go(struct tracer *tracer)
{
	detach_all(tracer, hold_now());
	return HOLD_DONE;
}
