/* Hold a VM: ovr's side, which forks the tracer. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "hold.h"

#define ANSWER_NS 3000000000 /* for the tracer's answer, on top of its own timeouts */

static pid_t fork_tracer(struct hold *hold)
{
	sigset_t all, before;
	pid_t pid;

	/*
	 * The raw system call: no fork handlers of libraries, and no signal on exit,
	 * which a SIGCHLD handler might see. Signals are blocked, so that no handler
	 * of ovr runs in the tracer.
	 */
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &before);
	pid = (pid_t)syscall(SYS_clone, CLONE_PIDFD, NULL, &hold->child, NULL, 0);
	if (!pid)
		tracer_main(hold);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return pid;
}

static int open_tasks(pid_t pid)
{
	char path[32] = "/proc/", digits[12];
	size_t at = strlen(path), count = 0;

	for (unsigned int left = (unsigned int)pid; left; left /= 10)
		digits[count++] = (char)('0' + left % 10);
	while (count)
		path[at++] = digits[--count];
	memcpy(path + at, "/task", 6);
	return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static void close_all(struct hold *hold)
{
	int *fds[] = {&hold->qemu, &hold->self, &hold->child, &hold->tasks,
		      &hold->own,  &hold->ask,  &hold->told};

	for (size_t i = 0; i < sizeof(fds) / sizeof(*fds); i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
}

int hold_start(struct hold *hold)
{
	int error;

	hold->qemu = hold->self = hold->child = -1;
	hold->tasks = hold->own = hold->ask = hold->told = -1;
	hold->tracer = 0;
	hold->page = mmap(NULL, sizeof(*hold->page), PROT_READ | PROT_WRITE,
			  MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (hold->page == MAP_FAILED) {
		hold->page = NULL;
		return errno;
	}
	if ((hold->qemu = (int)syscall(SYS_pidfd_open, hold->pid, 0)) >= 0 &&
	    (hold->self = (int)syscall(SYS_pidfd_open, getpid(), 0)) >= 0 &&
	    (hold->tasks = open_tasks(hold->pid)) >= 0 && (hold->own = open_tasks(getpid())) >= 0 &&
	    (hold->ask = eventfd(0, EFD_CLOEXEC)) >= 0 &&
	    (hold->told = eventfd(0, EFD_CLOEXEC)) >= 0 && (hold->tracer = fork_tracer(hold)) > 0)
		return 0;
	error = errno;
	hold->tracer = 0;
	close_all(hold);
	return error;
}

/* Wait for the tracer's answer; HOLD_DONE if it arrived in time. */
static enum hold_result await_answer(struct hold *hold, int64_t until)
{
	struct pollfd fds[] = {
		{.fd = hold->told, .events = POLLIN},
		{.fd = hold->child, .events = POLLIN},
	};
	uint64_t count;

	for (;;) {
		int64_t left = (until - hold_now()) / 1000000;

		if (left < 0)
			return HOLD_SILENT;
		if (poll(fds, 2, (int)left + 1) <= 0)
			continue; /* signals are handled after the hold */
		if (fds[0].revents & POLLIN) {
			(void)!read(hold->told, &count, sizeof(count));
			return HOLD_DONE;
		}
		return HOLD_LOST;
	}
}

/* Kill a tracer that is dead or does not answer; the VM runs, and the gate is broken. */
static void bury(struct hold *hold)
{
	if (!hold->tracer)
		return;
	__atomic_store_n(&hold->page->gate, GATE_BROKEN, __ATOMIC_SEQ_CST);
	syscall(SYS_pidfd_send_signal, hold->child, SIGKILL, NULL, 0);
	while (waitpid(hold->tracer, NULL, __WALL) < 0 && errno == EINTR)
		;
	if (hold->page->way == HOLD_BY_SIGSTOP)
		syscall(SYS_pidfd_send_signal, hold->qemu, SIGCONT, NULL, 0);
	hold->tracer = 0;
}

static enum hold_result request(struct hold *hold, enum hold_wish wish, int64_t wait_ns)
{
	enum hold_result result;
	uint64_t one = 1;

	if (!hold->tracer)
		return HOLD_LOST;
	__atomic_store_n(&hold->page->wish, (uint32_t)wish, __ATOMIC_SEQ_CST);
	(void)!write(hold->ask, &one, sizeof(one));
	result = await_answer(hold, hold_now() + wait_ns + ANSWER_NS);
	if (result == HOLD_DONE)
		return (enum hold_result)__atomic_load_n(&hold->page->answer, __ATOMIC_SEQ_CST);
	bury(hold);
	return result;
}

enum hold_result hold_take(struct hold *hold)
{
	return request(hold, HOLD_WISH_HELD, 2 * hold->patience_ns);
}

enum hold_result hold_let_go(struct hold *hold)
{
	uint32_t gate;

	if (!hold->tracer)
		return HOLD_LOST;
	gate = __atomic_load_n(&hold->page->gate, __ATOMIC_SEQ_CST);
	if (!(gate & FUTEX_OWNER_DIED))
		__atomic_compare_exchange_n(&hold->page->gate, &gate, GATE_SHUT, false,
					    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
	/* The tracer's answer tells if the hold was broken meanwhile. */
	return request(hold, HOLD_WISH_RUNNING, 0);
}

bool hold_alive(struct hold *hold)
{
	struct pollfd fd = {.fd = hold->child, .events = POLLIN};

	if (hold->tracer && poll(&fd, 1, 0) > 0)
		bury(hold);
	return hold->tracer;
}

void hold_end(struct hold *hold)
{
	uint64_t one = 1;
	struct pollfd fd = {.fd = hold->child, .events = POLLIN};

	if (hold->tracer) {
		__atomic_store_n(&hold->page->gate, GATE_SHUT, __ATOMIC_SEQ_CST);
		__atomic_store_n(&hold->page->wish, HOLD_WISH_END, __ATOMIC_SEQ_CST);
		(void)!write(hold->ask, &one, sizeof(one));
		while (poll(&fd, 1, ANSWER_NS / 1000000) < 0 && errno == EINTR)
			;
		bury(hold);
		__atomic_store_n(&hold->page->gate, GATE_SHUT, __ATOMIC_SEQ_CST);
	}
	close_all(hold);
}

/* Call it only after the last writer has left the gate. */
void hold_free(struct hold *hold)
{
	hold_end(hold);
	if (hold->page)
		munmap(hold->page, sizeof(*hold->page));
	hold->page = NULL;
}
