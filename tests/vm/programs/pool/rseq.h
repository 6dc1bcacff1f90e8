/* The rseq area that glibc has registered for the thread, and a critical section in it. */
#ifndef RSEQ_H
#define RSEQ_H

#include "check.h"

#include <sched.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <unistd.h>

static inline volatile struct rseq *rseq_area(void)
{
	return (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

/* The kernel keeps the CPU's number there: it must be the one that we run on. */
static inline void check_rseq(int thread)
{
	unsigned before = 0, there = 0, after = 0;

	for (int attempt = 0; attempt < 1000; attempt++) {
		before = rseq_area()->cpu_id;
		syscall(SYS_getcpu, &there, NULL, NULL);
		after = rseq_area()->cpu_id;
		if (before == there && after == there)
			break;
		sched_yield(); /* moved meanwhile, unless it happens every time */
	}
	if (before != there || after != there)
		expect(false, "rseq of thread %d: cpu %u, %u, but runs on %u", thread, before,
		       after, there);
}

/*
 * Add one to this CPU's counter, without an atomic operation: counters are `stride` bytes apart.
 * Return 1, or 0 when the kernel has interrupted us.
 */
static inline int rseq_add(uint64_t *first, size_t stride, unsigned cpus)
{
	volatile struct rseq *area = rseq_area();
	unsigned cpu = area->cpu_id_start;
	uint64_t *count = (void *)((char *)first + cpu * stride);

	if (cpu >= cpus)
		return 0;
	__asm__ goto(".pushsection .data.rseq_cs, \"aw\"\n\t"
		     ".balign 32\n"
		     "3:\t.long 0, 0\n\t"
		     ".quad 1f, 2f - 1f, 4f\n\t"
		     ".popsection\n\t"
		     "leaq 3b(%%rip), %%rax\n\t"
		     "movq %%rax, %[rseq_cs]\n"
		     "1:\tcmpl %[cpu], %[cpu_id]\n\t"
		     "jne 4f\n\t"
		     "addq $1, %[count]\n" /* the commit */
		     "2:\n\t"
		     ".pushsection .text.rseq_abort, \"ax\"\n\t"
		     ".byte 0x0f, 0xb9, 0x3d\n\t"
		     ".long %c[signature]\n"
		     "4:\tjmp %l[aborted]\n\t"
		     ".popsection\n\t"
		     :
		     : [rseq_cs] "m"(area->rseq_cs), [cpu_id] "m"(area->cpu_id), [cpu] "r"(cpu),
		       [count] "m"(*count), [signature] "i"(RSEQ_SIG)
		     : "rax", "memory", "cc"
		     : aborted);
	return 1;
aborted:
	return 0;
}

#endif
