/*
 * Touching mapped files that somebody may cut off.
 *
 * Guest RAM and pages images are mapped files. Where one was truncated, or its
 * disk gives an error, the kernel sends SIGBUS to who touches the page, which
 * would end us, with the VM held perhaps. ovr_guarded() runs a piece of work,
 * and returns the address of such a page if the work met one. The handler
 * leaves the work by a jump: the work must hold nothing but memory that its
 * caller knows of. No system call, and some nanoseconds, for each call.
 */
#ifndef OVR_GUARD_H
#define OVR_GUARD_H

#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>

struct ovr_guard {
	sigjmp_buf back;
	void *volatile address;
	struct ovr_guard *outer;
};

/* initial-exec: the handler must not be the first to touch it in a thread. */
static __thread struct ovr_guard *ovr_guard_here __attribute__((tls_model("initial-exec")));
static struct sigaction ovr_guard_before;
static volatile sig_atomic_t ovr_guard_passed_on;

static void ovr_guard_caught(int number, siginfo_t *info, void *context)
{
	struct ovr_guard *guard = ovr_guard_here;
	struct sigaction standard = {.sa_handler = SIG_DFL};

	(void)context;
	if (guard && info->si_code == BUS_ADRERR) {
		guard->address = info->si_addr;
		siglongjmp(guard->back, 1);
	}
	/*
	 * Not of our work. Who was here before gets it when the instruction is
	 * tried again; if that one leads back to us, it is the end.
	 */
	sigaction(number, ovr_guard_passed_on ? &standard : &ovr_guard_before, NULL);
	ovr_guard_passed_on = 1;
}

/* Before guarded work; cheap where nobody has put another handler in the place of ours. */
static void ovr_guard_install(void)
{
	struct sigaction now, ours = {.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};

	sigaction(SIGBUS, NULL, &now);
	if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == ovr_guard_caught)
		return;
	ovr_guard_before = now;
	ovr_guard_passed_on = 0;
	ours.sa_sigaction = ovr_guard_caught;
	sigemptyset(&ours.sa_mask);
	sigaction(SIGBUS, &ours, NULL);
}

/* NULL when all of the work is done, else the address that could not be touched. */
__attribute__((noinline)) static void *ovr_guarded(void (*work)(void *), void *job)
{
	struct ovr_guard guard = {.outer = ovr_guard_here};

	/* SA_NODEFER leaves the signal unblocked: no mask to save. */
	if (!sigsetjmp(guard.back, 0)) {
		ovr_guard_here = &guard;
		/* The compiler must not move the work out of what is between these. */
		__atomic_signal_fence(__ATOMIC_SEQ_CST);
		work(job);
		__atomic_signal_fence(__ATOMIC_SEQ_CST);
	}
	ovr_guard_here = guard.outer;
	return guard.address;
}

#endif
