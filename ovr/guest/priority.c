/*
 * Being served first while a restore is under way.
 *
 * Where the kernel groups processes by session (autogroup), a nice value counts within the session
 * only, and the session has one of its own. Nothing of this stays with restored tasks: CRIU gives
 * each its own nice value, and that of each session, theirs too, is reset before they run.
 *
 * Not real-time priority: since "hrtimer: Use and report correct timerslack values for realtime
 * tasks" (v6.12) children of a real-time process have a timer slack of 0, whatever they become.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "agent.h"

static bool raised;		/* this process, which had this nice value */
static int own_nice;

static void set_session(pid_t pid, int nice)
{
	char path[64], text[16];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/autogroup", pid ? pid : getpid());
	snprintf(text, sizeof(text), "%d", nice);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	/* A kernel without autogroups has no such file. Where it is forbidden it only takes longer. */
	if (fd < 0)
		return;
	if (write(fd, text, strlen(text)) < 0 && nice == 0)
		complain("%s cannot be reset", path);
	close(fd);
}

void priority_raise(pid_t pid)
{
	if (!pid && !raised)
		own_nice = getpriority(PRIO_PROCESS, 0);
	raised |= !pid;
	setpriority(PRIO_PROCESS, (id_t)pid, -20);
	set_session(pid, -20);
}

void priority_reset(pid_t pid)
{
	if (!pid && !raised)
		return;
	set_session(pid, 0);
	/* Of ourselves only: CRIU knows what to give to whom, and its own does not matter any more. */
	if (pid)
		return;
	setpriority(PRIO_PROCESS, 0, own_nice);
	raised = false;
}
