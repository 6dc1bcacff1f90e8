/* The tracer's parts. They run after a fork of a process with threads: system calls and memory. */
#ifndef OVR_TRACER_H
#define OVR_TRACER_H

#include "hold.h"

#define MAX_THREADS 4096

struct thread {
	pid_t tid;
	int signal;  /* to be delivered when it runs on */
	bool seized; /* else a thread that is not ours to stop */
	bool stopped;
	uint64_t switches; /* how often it was taken off its CPU */
};

struct tracer {
	struct hold *hold;
	struct hold_page *page;
	struct thread threads[MAX_THREADS];
	int count;
	bool spent; /* a thread is left seized that cannot be let go: end */
};

/* A line of /proc/PID/task/TID/stat. */
struct proc_stat {
	char state;
	unsigned int flags;
	int tty;
	int threads;
};

/* Fill in the ids of all threads; returns their number, or -1. */
int proc_threads(int tasks, pid_t *tids, int room);
bool proc_stat(int tasks, pid_t tid, struct proc_stat *stat);
/* A number of /proc/PID/task/TID/status, by what is before it ("TracerPid:"); -1 without one. */
int64_t proc_status(int tasks, pid_t tid, const char *name);
bool proc_dead(const struct proc_stat *stat);
/* A thread of the kernel in QEMU's thread group: vhost, io_uring. */
bool proc_worker(const struct proc_stat *stat);

enum hold_result ptrace_stop(struct tracer *tracer, int64_t deadline);
enum hold_result ptrace_let_go(struct tracer *tracer);
enum hold_result sigstop_stop(struct tracer *tracer, int64_t deadline);
enum hold_result sigstop_let_go(struct tracer *tracer);

void tracer_nap(int64_t ns);

#endif
