/*
 * Being served first while a restore is under way.
 *
 * Where the kernel groups processes by session (autogroup), a nice value counts within the session
 * only, and the session has one of its own. Nothing of this stays with restored tasks: CRIU gives
 * each its own nice value, and that of each session, theirs too, is reset before they run.
 *
 * A nice value does not make a process run at once when it wakes up: it may wait for tens of
 * milliseconds (EEVDF, since v6.6). Real-time priority does, but since "hrtimer: Use and report
 * correct timerslack values for realtime tasks" (v6.12) children of a real-time process have a timer
 * slack of 0, whatever they become. So it is for those who make no tasks: the agent, what it forks
 * to allocate memory, the hook, and CRIU once the tree stands. What the agent starts gets all of it back.
 */
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "agent.h"

static bool raised; /* this process, which had these */
static int own_nice, own_policy, own_slack;
static struct sched_param own_parameter;

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

static void set_real_time(pid_t pid, int priority)
{
	struct sched_param parameter = {.sched_priority = priority};

	/* Where that is forbidden it only takes longer. */
	sched_setscheduler(pid, SCHED_FIFO, &parameter);
}

void priority_real_time(pid_t pid)
{
	set_real_time(pid, 1);
}

void priority_raise(pid_t pid)
{
	if (!pid && !raised) {
		own_nice = getpriority(PRIO_PROCESS, 0);
		own_policy = sched_getscheduler(0);
		sched_getparam(0, &own_parameter);
		own_slack = prctl(PR_GET_TIMERSLACK);
	}
	raised |= !pid;
	setpriority(PRIO_PROCESS, (id_t)pid, -20);
	set_session(pid, -20);
	/* Before those who work for long: the host must be answered. */
	if (!pid)
		set_real_time(0, 2);
}

static void take_back(void)
{
	sched_setscheduler(0, own_policy, &own_parameter);
	setpriority(PRIO_PROCESS, 0, own_nice);
}

void priority_of_child(void)
{
	if (!raised)
		return;
	take_back();
	/* What its own children begin with, too. */
	prctl(PR_SET_TIMERSLACK, own_slack);
}

int priority_before(void)
{
	return raised ? own_nice : getpriority(PRIO_PROCESS, 0);
}

void priority_reset(pid_t pid)
{
	if (!pid && !raised)
		return;
	set_session(pid, 0);
	/* Of ourselves only: CRIU knows what to give to whom, and its own does not matter any more. */
	if (pid)
		return;
	take_back();
	raised = false;
}
