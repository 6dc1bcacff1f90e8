/* Read the state of QEMU's threads from /proc. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tracer.h"

#define PF_IO_WORKER 0x00000010u /* include/linux/sched.h */
#define PF_USER_WORKER 0x00004000u
#define PF_KTHREAD 0x00200000u

struct entry {
	uint64_t ino;
	int64_t off;
	uint16_t reclen;
	uint8_t type;
	char name[];
};

static int64_t number_at(const char **text)
{
	int64_t value = 0;
	bool minus = false;

	while (**text == ' ' || **text == '\t')
		++*text;
	if (**text == '-') {
		minus = true;
		++*text;
	}
	for (; **text >= '0' && **text <= '9'; ++*text)
		value = value * 10 + (**text - '0');
	return minus ? -value : value;
}

int proc_threads(int tasks, pid_t *tids, int room)
{
	/* A call returns about a thousand threads; one that exits between calls shifts the rest. */
	static char buffer[64 << 10] __attribute__((aligned(8)));
	int count = 0;
	long got;

	if (lseek(tasks, 0, SEEK_SET) < 0)
		return -1;
	while ((got = syscall(SYS_getdents64, tasks, buffer, sizeof(buffer))) > 0) {
		for (long at = 0; at < got;) {
			const struct entry *entry = (const void *)(buffer + at);
			const char *name = entry->name;

			at += entry->reclen;
			if (*name < '0' || *name > '9')
				continue;
			if (count == room)
				return room + 1;
			tids[count++] = (pid_t)number_at(&name);
		}
	}
	return got < 0 ? -1 : count;
}

/* Read a file of a thread. Returns its size, or -1. The text is NUL-terminated. */
static ssize_t read_file(int tasks, pid_t tid, const char *file, char *text, size_t room)
{
	char path[32], digits[12];
	size_t count = 0, at = 0;
	ssize_t got;
	int fd;

	for (unsigned int left = (unsigned int)tid; left || !count; left /= 10)
		digits[count++] = (char)('0' + left % 10);
	while (count)
		path[at++] = digits[--count];
	path[at++] = '/';
	memcpy(path + at, file, strlen(file) + 1);
	fd = openat(tasks, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	got = read(fd, text, room - 1);
	close(fd);
	text[got > 0 ? got : 0] = '\0';
	return got > 0 ? got : -1;
}

bool proc_stat(int tasks, pid_t tid, struct proc_stat *stat)
{
	static char text[1024];
	int64_t fields[18];
	const char *at;

	if (read_file(tasks, tid, "stat", text, sizeof(text)) < 0)
		return false;
	at = strrchr(text, ')'); /* a thread's name may contain any character */
	if (!at || !at[1])
		return false;
	at += 2;
	stat->state = *at++;
	for (size_t i = 0; i < 18; i++)
		fields[i] = number_at(&at);
	/* ppid, pgrp, session, tty_nr, tpgid, flags, ... num_threads is field 20 of the line. */
	stat->tty = (int)fields[3];
	stat->flags = (unsigned int)fields[5];
	stat->threads = (int)fields[16];
	return true;
}

int64_t proc_status(int tasks, pid_t tid, const char *name)
{
	static char text[8 << 10];
	const char *at;

	if (read_file(tasks, tid, "status", text, sizeof(text)) < 0)
		return -1;
	at = strstr(text, name);
	if (!at)
		return -1;
	at += strlen(name);
	return number_at(&at);
}

bool proc_dead(const struct proc_stat *stat)
{
	return stat->state == 'Z' || stat->state == 'X';
}

bool proc_worker(const struct proc_stat *stat)
{
	return stat->flags & (PF_IO_WORKER | PF_USER_WORKER | PF_KTHREAD);
}
