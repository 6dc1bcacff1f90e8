/*
 * tree: a deep chain of processes and a wide row of them, sessions and process groups, zombies
 * that nobody has reaped, one process with threads. As pid 1 of a pid namespace it reaps orphans.
 */
#include "check.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEEP 20
#define WIDE 30
#define ZOMBIES 3
#define WORKERS 5

/* This process, and its place in the tree. */
static struct {
	int number; /* 0: root, 1 … DEEP: in the chain, 100 …: in the row */
	pid_t pid, parent, group, session;
	mode_t mask;
	bool old_zombies; /* not yet reaped */
	pid_t zombies[ZOMBIES];
} self;

static struct pages own, inherited, inherited_from_root;

static struct worker {
	pthread_t id;
	int number;
	unsigned asked, answered;
} workers[WORKERS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

static void serve(unsigned round, unsigned phase);

static void *run_worker(void *argument)
{
	struct worker *worker = argument;
	char bytes[4 * PAGE] __attribute__((aligned(4096)));
	struct pages stack;

	pages_at(&stack, "thread's stack", bytes, sizeof(bytes));
	pages_write(&stack, 0, stack.count, 1000 * self.number + worker->number, FIRST);
	pthread_mutex_lock(&lock);
	for (;;) {
		while (worker->asked == worker->answered)
			pthread_cond_wait(&changed, &lock);
		pages_check(&stack);
		pages_renew(&stack, 1000 * self.number + worker->number, worker->asked);
		worker->answered = worker->asked;
		pthread_cond_broadcast(&changed);
	}
	return NULL;
}

static void ask_workers(unsigned round)
{
	pthread_mutex_lock(&lock);
	for (int i = 0; i < WORKERS; i++)
		workers[i].asked = round;
	pthread_cond_broadcast(&changed);
	for (int i = 0; i < WORKERS; i++)
		while (workers[i].answered != round)
			pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
}

static bool has_workers(void)
{
	return self.number == 7 || self.number == 107;
}

static int zombie_status(int index)
{
	return 10 + index + self.number % 50;
}

static void make_zombies(void)
{
	siginfo_t info;

	for (int i = 0; i < ZOMBIES; i++) {
		self.zombies[i] = check(fork(), "fork");
		if (!self.zombies[i] && i < 2)
			_exit(zombie_status(i));
		if (!self.zombies[i]) {
			raise(SIGKILL);
			_exit(1);
		}
		check(waitid(P_PID, self.zombies[i], &info, WEXITED | WNOWAIT), "waitid");
	}
	self.old_zombies = true;
}

static void become(int number)
{
	self.number = number;
	self.old_zombies = false;
	if (number % 5 == 2)
		check(setsid(), "setsid");
	else if (number % 3 == 1)
		check(setpgid(0, 0), "setpgid");
	self.mask = 0100 + number % 64;
	umask(self.mask);
	self.pid = getpid();
	self.parent = getppid();
	self.group = getpgrp();
	self.session = getsid(0);
	pages_new(&own, "own", 8 * (PAGE << number % 6));
	pages_write_every(&own, 0, 2, 1 + number, FIRST);
	pages_write_every(&inherited, number % 11, 11, 1 + number, FIRST);
	if (number % 6 == 0)
		make_zombies();
	if (number < DEEP)
		start_child(number + 1, become, serve);
	if (has_workers())
		for (int i = 0; i < WORKERS; i++) {
			workers[i].number = i;
			errno = pthread_create(&workers[i].id, NULL, run_worker, &workers[i]);
			if (errno)
				die("pthread_create");
		}
	if (number % 9 == 0) {
		pages_target(&own);
		pages_target(&inherited);
	}
}

/* --- checking --- */

static void check_zombies(void)
{
	for (int i = 0; i < ZOMBIES && self.old_zombies; i++) {
		siginfo_t info = {0};
		bool there = !waitid(P_PID, self.zombies[i], &info, WEXITED | WNOWAIT | WNOHANG);

		expect(there && info.si_pid == self.zombies[i], "zombie %d of %d is not there",
		       self.zombies[i], self.number);
		/* As when CRIU alone restores them. */
		expect(getpriority(PRIO_PROCESS, (id_t)self.zombies[i]) == 0,
		       "zombie %d of %d has another nice value", self.zombies[i], self.number);
		if (i < 2)
			expect(info.si_code == CLD_EXITED && info.si_status == zombie_status(i),
			       "zombie %d: code %d, status %d", i, info.si_code, info.si_status);
		else
			expect(info.si_code == CLD_KILLED && info.si_status == SIGKILL,
			       "killed zombie: code %d, status %d", info.si_code, info.si_status);
	}
}

static void check_place(void)
{
	mode_t mask = umask(self.mask);

	expect(getpid() == self.pid, "%d: pid is %d", self.number, getpid());
	if (self.number) /* the root's is whoever restored it */
		expect(getppid() == self.parent, "%d: parent is %d", self.number, getppid());
	expect(getpgrp() == self.group, "%d: group is %d", self.number, getpgrp());
	expect(getsid(0) == self.session, "%d: session is %d", self.number, getsid(0));
	expect(mask == self.mask, "%d: umask is %#o", self.number, mask);
	for (int i = 0; i < child_count; i++)
		expect(!kill(children[i].pid, 0), "child %d is gone", children[i].pid);
}

static void check_pages(void)
{
	pages_check(&own);
	pages_check(&inherited);
	pages_check(&inherited_from_root);
}

static void serve(unsigned round, unsigned phase)
{
	ask_children(round, phase);
	check_place();
	check_zombies();
	check_pages();
	if (phase == 0)
		return;
	if (has_workers())
		ask_workers(round);
	pages_renew(&own, 1 + self.number, round);
	pages_renew(&inherited, 1 + self.number, round);
	check_pages();
	if (round % 4 == 0 && self.old_zombies) {
		for (int i = 0; i < ZOMBIES; i++)
			expect(waitpid(self.zombies[i], NULL, 0) == self.zombies[i],
			       "zombie %d cannot be reaped", self.zombies[i]);
		make_zombies();
	}
}

/* A child that leaves a grandchild: whoever reaps orphans (pid 1, or a subreaper) is its parent. */
static void check_orphan(void)
{
	int status, pipes[2];
	pid_t child, orphan = 0;

	check(pipe(pipes), "pipe");
	child = check(fork(), "fork");
	if (!child) {
		orphan = fork();
		if (!orphan) {
			while (getppid() != self.pid)
				usleep(1000);
			_exit(77);
		}
		_exit(write(pipes[1], &orphan, sizeof(orphan)) != sizeof(orphan));
	}
	expect(waitpid(child, &status, 0) == child && status == 0, "a child fails: %#x", status);
	expect(read(pipes[0], &orphan, sizeof(orphan)) == sizeof(orphan), "no orphan");
	expect(waitpid(orphan, &status, 0) == orphan && WIFEXITED(status) &&
		       WEXITSTATUS(status) == 77,
	       "an orphan ends with %#x", status);
	close(pipes[0]);
	close(pipes[1]);
}

void set_up(void)
{
	pages_new(&inherited, "inherited", 2 * MIB);
	pages_write(&inherited, 0, inherited.count, 1, FIRST);
	pages_new(&inherited_from_root, "inherited, unchanged", MIB);
	pages_write(&inherited_from_root, 0, 250, 1, FIRST);
	check(prctl(PR_SET_CHILD_SUBREAPER, 1), "PR_SET_CHILD_SUBREAPER");
	for (int number = 0; number < WIDE; number++)
		start_child(100 + number, become, serve);
	become(0);
	pages_target(&inherited_from_root);
}

void answer(unsigned round)
{
	serve(round, 0);
	if (!all_right())
		return;
	serve(round, 1);
	check_orphan();
	expect(self.session == self.pid, "the root leads no session");
}
