/*
 * Holding a VM still: what ovr and its tracer share.
 *
 * A hold is taken and ended by a process of its own, the tracer, so that it ends
 * whatever becomes of ovr. Both map one page. Its gate is open while the VM is
 * held: whoever writes to guest RAM enters it first and leaves it afterwards, and
 * the tracer lets the VM run only when the gate is shut and nobody is inside.
 */
#ifndef OVR_HOLD_H
#define OVR_HOLD_H

#include <linux/futex.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What becomes of a request. */
enum hold_result {
	HOLD_DONE = 0,
	HOLD_GONE,      /* QEMU has ended */
	HOLD_TRACED,    /* the process `who` traces a thread of it */
	HOLD_FORBIDDEN, /* it may neither be traced nor be signalled */
	HOLD_STUCK,     /* its thread `who` does not stop */
	HOLD_TERMINAL,  /* SIGSTOP is all there is, and a shell may answer it */
	HOLD_RAN,       /* it was sent SIGCONT while it was held */
	HOLD_BROKEN,    /* it was held for too long, and was let go */
	HOLD_LOST,      /* the tracer was killed */
	HOLD_SILENT,    /* the tracer did not answer, and was killed */
	HOLD_CROWDED,   /* it has more threads than the tracer has room for */
};

enum hold_way { HOLD_BY_NOTHING = 0, HOLD_BY_PTRACE, HOLD_BY_SIGSTOP };

enum hold_wish { HOLD_WISH_HELD = 0, HOLD_WISH_RUNNING, HOLD_WISH_END };

/*
 * The gate's values, besides the tracer's thread id: open. It is a robust futex of
 * the tracer (set_robust_list(2)): when that dies the kernel sets FUTEX_OWNER_DIED
 * in it, in exit_mm_release(), which comes before exit_notify() lets tracees run.
 */
#define GATE_SHUT 0u
#define GATE_BROKEN ((uint32_t)FUTEX_OWNER_DIED)

struct hold_page {
	uint32_t gate;
	uint32_t generation; /* of the hold that the gate is, or was, open for */
	uint32_t writers;    /* inside of the gate */
	uint32_t wish;       /* enum hold_wish, of ovr */
	uint32_t way;        /* enum hold_way */
	uint32_t answer;     /* enum hold_result */
	int32_t who;         /* whom the answer is about */
	int64_t until;       /* when honest work should end; ns, CLOCK_MONOTONIC */
	struct robust_list_head robust;
	struct robust_list futex;
};

/* ovr's end. */
struct hold {
	struct hold_page *page;
	int64_t bound_ns;    /* for how long a hold may last */
	int64_t patience_ns; /* for how long QEMU's threads may take to stop */
	pid_t pid;           /* QEMU */
	pid_t tracer;
	int qemu; /* pidfds */
	int self;
	int child;
	int tasks; /* /proc/PID/task, of QEMU and of ovr */
	int own;
	int ask; /* eventfds: to the tracer, from it */
	int told;
};

int hold_start(struct hold *hold); /* 0 or an errno; pid, bound_ns and patience_ns are set */
enum hold_result hold_take(struct hold *hold);
enum hold_result hold_let_go(struct hold *hold);
bool hold_alive(struct hold *hold);
void hold_end(struct hold *hold);
void hold_free(struct hold *hold);

/* The tracer; never returns. */
_Noreturn void tracer_main(struct hold *hold);

int64_t hold_now(void); /* ns, CLOCK_MONOTONIC */

enum gate_entry { GATE_ENTERED = 0, GATE_IS_SHUT, GATE_IS_BROKEN };

/* Without a page there is no gate. `generation` is 0 at first, then says which hold it was. */
static inline enum gate_entry gate_enter(struct hold_page *page, uint32_t *generation)
{
	uint32_t gate, now;

	if (!page)
		return GATE_ENTERED;
	__atomic_fetch_add(&page->writers, 1, __ATOMIC_SEQ_CST);
	gate = __atomic_load_n(&page->gate, __ATOMIC_SEQ_CST);
	now = __atomic_load_n(&page->generation, __ATOMIC_SEQ_CST);
	if (gate && !(gate & FUTEX_OWNER_DIED) && (!*generation || *generation == now)) {
		*generation = now;
		return GATE_ENTERED;
	}
	__atomic_fetch_sub(&page->writers, 1, __ATOMIC_SEQ_CST);
	return *generation || gate & FUTEX_OWNER_DIED ? GATE_IS_BROKEN : GATE_IS_SHUT;
}

static inline void gate_leave(struct hold_page *page)
{
	if (page)
		__atomic_fetch_sub(&page->writers, 1, __ATOMIC_SEQ_CST);
}

/* Whether what is left should wait for another hold. */
static inline bool gate_late(const struct hold_page *page)
{
	return page && hold_now() > page->until;
}

#endif
