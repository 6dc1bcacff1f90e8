/*
 * Hold a VM: declarations shared by ovr and its tracer.
 *
 * A separate process, the tracer, takes and ends a hold, so that it ends even if
 * ovr dies or hangs. Both map one page with a gate, which is open while the VM is
 * held. Writers to guest RAM enter the gate first and leave it afterwards, and
 * the tracer lets the VM run only when the gate is shut and no writer is inside.
 */
#ifndef OVR_HOLD_H
#define OVR_HOLD_H

#include <linux/futex.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* The result of a request. */
enum hold_result {
	HOLD_DONE = 0,
	HOLD_GONE,      /* QEMU has exited */
	HOLD_TRACED,    /* the process `who` traces a thread of QEMU */
	HOLD_FORBIDDEN, /* no permission to trace or signal QEMU */
	HOLD_STUCK,     /* QEMU's thread `who` does not stop */
	HOLD_TERMINAL,  /* only SIGSTOP is possible, and a shell may undo it */
	HOLD_RAN,       /* QEMU got SIGCONT during the hold */
	HOLD_BROKEN,    /* the hold took too long and was ended */
	HOLD_LOST,      /* the tracer was killed */
	HOLD_SILENT,    /* the tracer did not answer, and was killed */
	HOLD_CROWDED,   /* QEMU has more than MAX_THREADS threads */
};

enum hold_way { HOLD_BY_NOTHING = 0, HOLD_BY_PTRACE, HOLD_BY_SIGSTOP };

enum hold_wish { HOLD_WISH_HELD = 0, HOLD_WISH_RUNNING, HOLD_WISH_END };

/*
 * Values of the gate besides the tracer's thread id, which means open. The gate is
 * a robust futex of the tracer (set_robust_list(2)): when the tracer dies the kernel
 * sets FUTEX_OWNER_DIED in exit_mm_release(), before exit_notify() lets tracees run.
 */
#define GATE_SHUT 0u
#define GATE_BROKEN ((uint32_t)FUTEX_OWNER_DIED)

struct hold_page {
	uint32_t gate;
	uint32_t generation; /* number of the current or last hold */
	uint32_t writers;    /* number of writers inside the gate */
	uint32_t wish;       /* enum hold_wish, set by ovr */
	uint32_t way;        /* enum hold_way */
	uint32_t answer;     /* enum hold_result */
	int32_t who;         /* the process or thread that the answer is about */
	int64_t until;       /* when writers should stop; ns, CLOCK_MONOTONIC */
	struct robust_list_head robust;
	struct robust_list futex;
};

/* ovr's side of a hold. */
struct hold {
	struct hold_page *page;
	int64_t bound_ns;    /* maximum length of a hold */
	int64_t patience_ns; /* maximum time to stop QEMU's threads */
	pid_t pid;           /* QEMU */
	pid_t tracer;
	int qemu; /* pidfds */
	int self;
	int child;
	int tasks; /* /proc/PID/task of QEMU and of ovr */
	int own;
	int ask; /* eventfds: to the tracer, from it */
	int told;
};

int hold_start(struct hold *hold); /* 0 or an errno; set pid, bound_ns and patience_ns before */
enum hold_result hold_take(struct hold *hold);
enum hold_result hold_let_go(struct hold *hold);
bool hold_alive(struct hold *hold);
void hold_end(struct hold *hold);
void hold_free(struct hold *hold);

/* The tracer; never returns. */
_Noreturn void tracer_main(struct hold *hold);

int64_t hold_now(void); /* ns, CLOCK_MONOTONIC */

enum gate_entry { GATE_ENTERED = 0, GATE_IS_SHUT, GATE_IS_BROKEN };

/* `page` is NULL if there is no gate. `generation` is 0 at first, then the number of the hold. */
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

/* Whether remaining work should wait for the next hold. */
static inline bool gate_late(const struct hold_page *page)
{
	return page && hold_now() > page->until;
}

#endif
