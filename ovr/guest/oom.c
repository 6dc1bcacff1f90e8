/*
 * Whom the OOM killer takes: who allocates for a restore first, the agent never.
 *
 * Were it the agent, nobody would answer the host, and kill the tree. Were it
 * CRIU, it would release the tree. What the agent starts has the agent's
 * first score again, and restored tasks get their own.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

static char first[16]; /* what we were started with */

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
		first[0] = 0; /* not permitted: nothing has changed */
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
