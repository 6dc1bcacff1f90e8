// Sample process for image fixtures: threads, VMAs of many kinds, files, unusual state. See tests/unit/images/data/README.md.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096

static void *at(uintptr_t where, size_t pages, int prot, int flags, int fd)
{
	void *p = mmap((void *)where, pages * PAGE, prot, flags | MAP_FIXED_NOREPLACE, fd, 0);
	if (p == MAP_FAILED) { perror("mmap"); exit(1); }
	return p;
}

static void fill(uintptr_t page) { for (int i = 0; i < PAGE / 8; i++) ((uint64_t *)page)[i] = page + i; }

static void *worker(void *name)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	prctl(PR_SET_NAME, name);
	for (;;) pause();
}

static void on_signal(int sig) { (void)sig; }

int main(int argc, char **argv)
{
	int tree = argc > 1 && !strcmp(argv[1], "tree");
	int churn = argc > 1 && !strcmp(argv[1], "churn");
	umask(0137);
	struct rlimit limit = {123, 456};
	setrlimit(RLIMIT_NOFILE, &limit);
	sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal, .sa_flags = SA_RESTART}, NULL);

	// every second page touched: 8 one-page runs in one VMA
	at(0x100000000, 16, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (int i = 0; i < 16; i += 2) fill(0x100000000 + i * PAGE);
	// two VMAs that touch, differing in protection; content in all pages: one run across both
	at(0x100100000, 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (int i = 0; i < 8; i++) fill(0x100100000 + i * PAGE);
	mprotect((void *)0x100104000, 2 * PAGE, PROT_READ);
	mprotect((void *)0x100106000, 2 * PAGE, PROT_NONE);
	// changed pages of a private file mapping
	int fd = open("/root/mapped", O_RDWR | O_CREAT | O_TRUNC, 0644);
	if (ftruncate(fd, 4 * PAGE)) return 1;
	at(0x100200000, 4, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
	fill(0x100201000);
	lseek(fd, 1234, SEEK_SET);
	// shared anonymous memory, a growing stack, huge-page advice
	at(0x100300000, 2, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
	fill(0x100300000);
	at(0x100400000, 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1);
	fill(0x100403000);
	at(0x100600000, 512, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	madvise((void *)0x100600000, 512 * PAGE, MADV_DONTFORK);

	eventfd(4242, 0);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	signalfd(-1, &set, 0);
	int ends[2];
	if (pipe2(ends, O_CLOEXEC) || write(ends[1], "in the pipe", 11) != 11) return 1;

	pthread_attr_t attr;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 65536);
	pthread_t thread;
	pthread_create(&thread, &attr, worker, "first");
	pthread_create(&thread, &attr, worker, "second");
	if (tree) {
		if (!fork()) {
			fill(0x100000000);            // differs from the parent from here on
			setpgid(0, 0);
			for (;;) pause();
		}
		if (!fork()) _exit(7);                // stays a zombie
	}
	usleep(300000);
	puts("ready");
	fflush(stdout);
	for (unsigned n = 0;; n++) {
		if (churn) { usleep(100000); fill(0x100100000 + n % 4 * PAGE); }
		else pause();
	}
}
