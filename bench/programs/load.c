/*
 * bench-load: keeps every CPU busy with computing and with memory traffic.
 *
 *     bench-load COMPUTE MEMORY BYTES
 *
 * For each online CPU it starts COMPUTE processes that only compute and MEMORY processes that copy
 * BYTES back and forth, which is more than the CPU's caches hold. Each process is a session of its own,
 * as services are: the kernel's autogroups give each its own share of the CPU. All end with the
 * first one.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static void compute(void)
{
	volatile uint64_t state = 1;

	for (;;)
		state = state * 6364136223846793005ull + 1442695040888963407ull;
}

static void traffic(size_t bytes)
{
	char *from = malloc(bytes), *to = malloc(bytes), *other;

	if (!from || !to)
		_exit(1);
	memset(from, 1, bytes);
	for (;;) {
		memcpy(to, from, bytes);
		other = to, to = from, from = other;
	}
}

static void start(size_t bytes)
{
	pid_t parent = getpid();

	if (fork())
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(0);
	setsid();
	if (bytes)
		traffic(bytes);
	compute();
}

int main(int argc, char **argv)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	if (argc != 4) {
		fprintf(stderr, "usage: bench-load COMPUTE MEMORY BYTES\n");
		return 2;
	}
	for (long cpu = 0; cpu < cpus; cpu++) {
		for (int i = 0; i < atoi(argv[1]); i++)
			start(0);
		for (int i = 0; i < atoi(argv[2]); i++)
			start(strtoull(argv[3], NULL, 0));
	}
	wait(NULL); /* no child exits by itself */
	fprintf(stderr, "bench-load: one of my processes has died\n");
	return 1;
}
