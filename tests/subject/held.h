/* Whether a process is held by CRIU, for programs that disturb a restore. */
#ifndef HELD_H
#define HELD_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

/* In a stop of ptrace's; its name may be another than its program's as yet. */
static bool held(pid_t pid)
{
	char path[64], text[512], *state;
	ssize_t size;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	size = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	if (size <= 0)
		return false;
	text[size] = 0;
	state = strrchr(text, ')');
	return state && state[1] == ' ' && state[2] == 't';
}

#endif
