/* A process with every kind of page that a walk meets; says "ready" and stands still. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE (2UL << 20)

static char *map(size_t size, int flags, int fd)
{
	char *area = mmap(NULL, size, PROT_READ | (fd < 0 ? PROT_WRITE : 0), flags, fd, 0);

	if (area == MAP_FAILED)
		perror("mmap");
	return area;
}

static int touch(const char *area, size_t size)
{
	int sum = 0;

	for (size_t at = 0; at < size; at += 4096)
		sum += *(const volatile char *)(area + at);
	return sum;
}

int main(int argc, char **argv)
{
	char *huge = map(3 * HUGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	char *none = map(64 * 4096, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	char *hugenone = map(2 * HUGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	char *zeros = map(32 * 4096, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	char *shared = map(16 * 4096, MAP_SHARED | MAP_ANONYMOUS, -1);
	int fd = open(argv[argc - 1], O_RDONLY);
	char *file = map(8 * 4096, MAP_PRIVATE, fd);
	char *sharedfile = map(8 * 4096, MAP_SHARED, fd);
	int sum;

	madvise(huge, 3 * HUGE, MADV_HUGEPAGE);
	madvise(hugenone, 2 * HUGE, MADV_HUGEPAGE);
	memset(huge, 1, 3 * HUGE);
	memset(hugenone, 2, 2 * HUGE);
	mprotect(hugenone, 2 * HUGE, PROT_NONE);
	for (int page = 0; page < 64; page += 2)
		none[4096 * page] = 3;
	mprotect(none, 64 * 4096, PROT_NONE);
	sum = touch(zeros, 32 * 4096);
	memset(shared, 4, 8 * 4096);
	sum += touch(file, 4 * 4096) + touch(sharedfile, 2 * 4096);
	mprotect(file, 4096, PROT_READ | PROT_WRITE);
	file[0] = 5;
	mlockall(MCL_CURRENT);
	printf("ready %d\n", sum);
	fflush(stdout);
	for (;;)
		pause();
}
