/* Parts of the tracer. They run after a fork of a process with threads: system calls only. */
#ifndef OVR_TRACER_H
#define OVR_TRACER_H

#include "hold.h"

#define MAX_THREADS 4096

struct thread {
	pid_t tid;
	int signal;  /* to deliver when it is detached */
	bool seized; /* false: a thread of the kernel */
	bool stopped;
	uint64_t switches; /* number of context switches */
};

struct tracer {
	struct hold *hold;
	struct hold_page *page;
	struct thread threads[MAX_THREADS];
	int count;
	bool spent; /* a seized thread could not be detached: the tracer must exit */
};

/* A line of /proc/PID/task/TID/stat. */
struct proc_stat {
	char state;
	unsigned int flags;
	int tty;
	int threads;
};

/* Fill in the ids of all threads. Returns their number, or -1. */
int proc_threads(int tasks, pid_t *tids, int room);
bool proc_stat(int tasks, pid_t tid, struct proc_stat *stat);
/* The number after a name ("TracerPid:") in /proc/PID/task/TID/status, or -1. */
int64_t proc_status(int tasks, pid_t tid, const char *name);
bool proc_dead(const struct proc_stat *stat);
/* A kernel thread in QEMU's thread group: vhost, io_uring. */
bool proc_worker(const struct proc_stat *stat);

enum hold_result ptrace_stop(struct tracer *tracer, int64_t deadline);
enum hold_result ptrace_let_go(struct tracer *tracer);
enum hold_result sigstop_stop(struct tracer *tracer, int64_t deadline);
enum hold_result sigstop_let_go(struct tracer *tracer);

void tracer_nap(int64_t ns);

#endif
