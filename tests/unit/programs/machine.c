/*
 * A process that is to a hold what a QEMU is: threads that write to a RAM file.
 *
 * machine FILE THREADS [churn] [undumpable] [idle]
 *
 * Each thread counts in a cache line of its own of the second page; the first has
 * in its first word how many SIGRTMIN have come, and the file is as large as it was.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static volatile uint64_t *ram;

static void counted(int number)
{
	(void)number;
	__atomic_fetch_add(&ram[0], 1, __ATOMIC_SEQ_CST);
}

static void *work(void *number)
{
	volatile uint64_t *mine = ram + 512 + 8 * (uintptr_t)number;

	for (;;) {
		for (int i = 0; i < 200; i++)
			++*mine;
		syscall(SYS_getppid);
	}
	return NULL;
}

static void *idle(void *nothing)
{
	for (;;)
		pause();
	return nothing;
}

static void *once(void *nothing)
{
	for (int i = 0; i < 2000; i++)
		++ram[512 + 8 * 30];
	return nothing;
}

static void *churn(void *nothing)
{
	for (;;) {
		pthread_t threads[3];

		for (int i = 0; i < 3; i++)
			pthread_create(&threads[i], NULL, once, NULL);
		for (int i = 0; i < 3; i++)
			pthread_join(threads[i], NULL);
	}
	return nothing;
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = counted, .sa_flags = SA_RESTART};
	int fd = open(argv[1], O_RDWR | O_CLOEXEC);
	void *(*run)(void *) = work;
	pthread_t thread;

	ram = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (ram == MAP_FAILED)
		return 1;
	sigaction(SIGRTMIN, &action, NULL);
	for (int i = 3; i < argc; i++) {
		if (!strcmp(argv[i], "churn"))
			pthread_create(&thread, NULL, churn, NULL);
		if (!strcmp(argv[i], "undumpable"))
			prctl(PR_SET_DUMPABLE, 0);
		if (!strcmp(argv[i], "idle"))
			run = idle;
	}
	for (int i = 1; i < atoi(argv[2]); i++)
		pthread_create(&thread, NULL, run, (void *)(uintptr_t)i);
	puts("ready");
	fflush(stdout);
	run(0);
}
