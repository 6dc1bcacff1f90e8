/*
 * states: a process (or a tree) with unusual values for every kind of state that ovr restores.
 *
 *     states DIR PROCESSES
 *
 * PROCESSES processes (each the child of the one before), THREADS threads each, every one with
 * values of its own. Each process writes DIR/pid.N when it is ready. On SIGUSR1 to a process it
 * asks the kernel for everything anew, each thread for itself, and writes one JSON object to
 * DIR/answer.N: the keys are ovr's names of the kinds; `threads` has an object for each thread.
 *
 * No malloc after the start: a heap that is not restored must be seen, not crash us.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "states.h"

const char *dir;
int number;
struct thread threads[THREADS];

void die(const char *what)
{
	dprintf(2, "states: %s: %s\n", what, strerror(errno));
	_exit(1);
}

void check(long result, const char *what)
{
	if (result < 0)
		die(what);
}

static void *run_thread(void *argument)
{
	struct thread *self = argument;

	self->tid = syscall(SYS_gettid);
	set_thread(self);
	self->done = self->turn = 1;
	for (;;) {
		while (self->turn == self->done)
			syscall(SYS_futex, &self->turn, FUTEX_WAIT, self->done, NULL, NULL, 0);
		ask_thread(self);
		self->done = self->turn;
	}
	return NULL;
}

static void start_child(char **argv, int processes)
{
	char name[16];
	pid_t child;

	if (number + 1 >= processes)
		return;
	child = fork();
	check(child, "fork");
	if (child)
		return;
	/* A new image: addresses of its own, too. */
	snprintf(name, sizeof(name), "%d", number + 1);
	argv[3] = name;
	execv("/proc/self/exe", argv);
	die("exec");
}

static void start_threads(void)
{
	pthread_t id;

	for (int i = 0; i < THREADS; i++)
		threads[i].number = i;
	for (int i = 1; i < THREADS; i++)
		if (pthread_create(&id, NULL, run_thread, &threads[i]))
			die("pthread_create");
	for (int i = 1; i < THREADS; i++)
		while (!threads[i].done)
			usleep(1000);
	threads[0].tid = getpid();
	set_thread(&threads[0]);
}

int main(int argc, char **argv)
{
	char *arguments[5] = {argv[0]};
	sigset_t wanted;
	int got, null;

	if (argc < 3 || argc > 4) {
		dprintf(2, "usage: states DIR PROCESSES\n");
		return 2;
	}
	memcpy(arguments, argv, argc * sizeof(*argv));
	dir = argv[1];
	number = argc == 4 ? atoi(argv[3]) : 0;
	null = open("/dev/null", O_RDWR);
	check(null, "/dev/null");
	if (number == 0) {
		setsid();
		for (int fd = 0; fd < 2; fd++)
			dup2(null, fd);
		set_container();
	}
	start_child(arguments, atoi(argv[2]));
	set_process();
	start_threads();
	check(prctl(PR_SET_DUMPABLE, number % 2 == 0), "PR_SET_DUMPABLE");
	dup2(null, 2);
	tell_pid();
	sigemptyset(&wanted);
	sigaddset(&wanted, SIGUSR1);
	for (;;)
		if (!sigwait(&wanted, &got))
			answer();
}
