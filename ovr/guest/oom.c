/*
 * OOM scores: processes that allocate for a restore are killed first, the agent never.
 *
 * Without the agent the tree would neither be killed nor resumed, and without
 * CRIU it would be released. Programs started by the agent get back the score
 * that it was started with, and restored tasks get their own.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

static char first[16]; /* the agent's score when it was started */

static bool set(pid_t pid, const char *score)
{
	char path[64];
	int fd;
	bool done;

	snprintf(path, sizeof(path), "/proc/%d/oom_score_adj", pid);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	done = write(fd, score, strlen(score)) == (ssize_t)strlen(score);
	close(fd);
	return done;
}

void oom_protect_agent(void)
{
	int fd = open("/proc/self/oom_score_adj", O_RDONLY | O_CLOEXEC);
	ssize_t size = fd < 0 ? 0 : read(fd, first, sizeof(first) - 1);

	if (fd >= 0)
		close(fd);
	first[size > 0 ? size : 0] = 0;
	if (first[0] && !set(getpid(), "-1000"))
		first[0] = 0; /* not permitted: nothing to restore later */
}

void oom_as_before(void)
{
	if (first[0])
		set(getpid(), first);
}

void oom_take_me_first(void)
{
	set(getpid(), "1000");
}

void oom_hide(pid_t pid)
{
	if (!set(pid, "-1000"))
		complain("/proc/%d/oom_score_adj: %s", pid, strerror(errno));
}
