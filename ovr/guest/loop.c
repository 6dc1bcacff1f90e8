/* The poll loop: each turn collects the descriptors and deadlines of all parts anew. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "restore.h"

static bool stopping;

int64_t now_us(void)
{
	struct timespec now;

	/* Stops while the VM is paused, so that no deadline of the host expires meanwhile. */
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

int64_t now_ms(void)
{
	return now_us() / 1000;
}

void sleep_ms(int ms)
{
	poll(NULL, 0, ms);
}

void complain(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("ovr-agent: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
}

void reap_children(void)
{
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (!restore_reaped(pid, status) && !populate_reaped(pid, status) &&
		    !warm_reaped(pid, status) && !track_reaped(pid) && !find_reaped(pid, status))
			lab_reaped(pid, status);
}

void loop_watch(struct loop *loop, int fd, short events, callback call, void *context)
{
	if (loop->count == ARRAY_SIZE(loop->fds))
		abort(); /* the arrays hold the maximum */
	loop->fds[loop->count] = (struct pollfd){.fd = fd, .events = events};
	loop->calls[loop->count] = call;
	loop->contexts[loop->count++] = context;
}

void loop_wake_at(struct loop *loop, int64_t deadline)
{
	if (loop->deadline < 0 || deadline < loop->deadline)
		loop->deadline = deadline;
}

static void on_signal(int fd, short events, void *context)
{
	struct signalfd_siginfo info;

	(void)events, (void)context;
	while (read(fd, &info, sizeof(info)) == (ssize_t)sizeof(info))
		stopping |= info.ssi_signo != SIGCHLD;
	reap_children();
}

static int block_signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	return signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
}

static void turn(struct loop *loop)
{
	int64_t now = now_ms();
	int timeout = -1;

	if (loop->deadline >= 0)
		timeout = loop->deadline <= now ? 0 : (int)(loop->deadline - now) + 1;
	if (poll(loop->fds, (nfds_t)loop->count, timeout) < 0)
		return;
	for (int i = 0; i < loop->count; i++)
		if (loop->fds[i].revents)
			loop->calls[i](loop->fds[i].fd, loop->fds[i].revents, loop->contexts[i]);
}

void loop_run(struct loop *loop)
{
	int signals = block_signals();

	complain("ready");
	while (!stopping || restore_lingers()) {
		/* Work first: watched descriptors must not change while they are collected. */
		restore_work();
		lab_work();
		find_work();
		session_work();
		restore_rest();
		loop->count = 0;
		loop->deadline = -1;
		loop_watch(loop, signals, POLLIN, on_signal, NULL);
		restore_watch(loop);
		populate_watch(loop);
		track_watch(loop);
		warm_watch(loop);
		find_watch(loop);
		lab_watch(loop);
		session_watch(loop);
		transport_watch(loop);
		turn(loop);
		if (stopping)
			restore_shutdown();
	}
	warm_shutdown();
}
