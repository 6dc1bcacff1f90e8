/*
 * Access mapped files that may be truncated meanwhile.
 *
 * Guest RAM and pages images are mapped files. If one is truncated, or its disk
 * has an error, an access to the page raises SIGBUS, which would kill ovr,
 * possibly with the VM held. ovr_guarded() runs a function, and returns the
 * address of such a page if the function met one. The handler leaves the
 * function by siglongjmp(): it must hold no locks, and no memory that its caller
 * does not know. A call takes some nanoseconds and no system call.
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

/* initial-exec: a first access in the handler must not allocate. */
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
	 * Outside of guarded work. Install the previous handler, which gets the
	 * signal when the instruction is retried; if that one passes it back,
	 * install the default action.
	 */
	sigaction(number, ovr_guard_passed_on ? &standard : &ovr_guard_before, NULL);
	ovr_guard_passed_on = 1;
}

/* Call before guarded work. Cheap unless another handler has been installed meanwhile. */
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

/* NULL if the work completed, else the address of the failed access. */
__attribute__((noinline)) static void *ovr_guarded(void (*work)(void *), void *job)
{
	struct ovr_guard guard = {.outer = ovr_guard_here};

	/* SA_NODEFER leaves the signal unblocked: no mask to save. */
	if (!sigsetjmp(guard.back, 0)) {
		ovr_guard_here = &guard;
		/* Keep the compiler from moving the work out of the guarded section. */
		__atomic_signal_fence(__ATOMIC_SEQ_CST);
		work(job);
		__atomic_signal_fence(__ATOMIC_SEQ_CST);
	}
	ovr_guard_here = guard.outer;
	return guard.address;
}

#endif
