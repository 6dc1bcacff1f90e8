/*
 * Run CRIU once while a pool is filled.
 *
 * At its first run after the boot CRIU probes the kernel's features, and keeps
 * the result (kerndat_init() in criu/kerndat.c). That takes longer than the rest
 * of a small restore, and would be part of a tree's downtime.
 */
#include <signal.h>
#include <stdint.h>

#include "warm.h"

#define PATIENCE_MS 60000

static pid_t primer; /* 0: it does not run */
static int64_t kill_at;

void prime_begin(void)
{
	char *argv[] = {(char *)(uintptr_t)options.criu, "check", NULL};
	char *env[] = {AGENT_PATH, NULL};

	if (primer)
		return;
	primer = child_start_mortal(argv, env, (struct child_io){-1, -1, -1});
	/* Without it the first CRIU takes longer; nothing else. */
	if (primer < 0)
		primer = 0;
	kill_at = now_ms() + PATIENCE_MS;
}

bool prime_under_way(void)
{
	return primer;
}

bool prime_owns(pid_t pid)
{
	return primer && primer == pid;
}

bool prime_reaped(pid_t pid)
{
	if (!prime_owns(pid))
		return false;
	primer = 0;
	return true;
}

void prime_watch(struct loop *loop)
{
	if (!primer)
		return;
	if (now_ms() >= kill_at)
		kill(primer, SIGKILL);
	else
		loop_wake_at(loop, kill_at);
}
