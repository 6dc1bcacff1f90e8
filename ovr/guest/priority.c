/*
 * Raise the priority of processes that take part in a restore.
 *
 * Where the kernel groups processes by session (autogroup), a nice value is relative to the
 * session, which has a nice value of its own. Restored tasks keep none of this: CRIU sets the nice
 * value of each, and those of their sessions are reset before they run.
 *
 * A process with a low nice value may still wait for tens of milliseconds when it wakes up (EEVDF,
 * since v6.6). A real-time process does not. But since "hrtimer: Use and report correct timerslack
 * values for realtime tasks" (v6.12) its children have a timer slack of 0, and keep it. So only
 * processes that create no restored tasks get real-time priority: the agent, its workers, the hook,
 * and CRIU once the tree is built. Programs started by the agent get the original attributes.
 */
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "agent.h"

static bool raised; /* this process; the variables below hold its attributes from before */
static int own_nice, own_policy, own_slack;
static struct sched_param own_parameter;

static void set_session(pid_t pid, int nice)
{
	char path[64], text[16];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/autogroup", pid ? pid : getpid());
	snprintf(text, sizeof(text), "%d", nice);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	/* Missing without autogroups. Without permission a restore only takes longer. */
	if (fd < 0)
		return;
	if (write(fd, text, strlen(text)) < 0 && nice == 0)
		complain("cannot reset %s", path);
	close(fd);
}

static void set_real_time(pid_t pid, int priority)
{
	struct sched_param parameter = {.sched_priority = priority};

	/* Without permission a restore only takes longer. */
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
	/* Above the workers, which run for long: the agent must answer the host. */
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
	/* Also sets the default that the child's own children inherit. */
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
	/* CRIU has set the attributes of the tasks, and its own do not matter any more. */
	if (pid)
		return;
	take_back();
	raised = false;
}
