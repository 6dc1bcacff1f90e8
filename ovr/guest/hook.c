/*
 * CRIU's action script is this program again.
 *
 * At pre-resume CRIU holds the whole tree in ptrace stops and waits for its
 * script. Whatever ends the script lets CRIU detach, so the first thing done
 * here is to stop CRIU itself: from then on neither the death of this
 * process nor of the agent lets a task run. The next thing is that the kernel
 * kills what CRIU holds should CRIU itself die (exitkill.c). Only the agent's
 * word makes us continue CRIU. When the agent's connection ends without that
 * word, we kill the tree ourselves.
 *
 * At pre-restore and post-restore, where a bad exit status makes CRIU give up
 * or kill the tree, we only make sure that the agent is there. What an engine
 * restores lacks an image until then (engine.c).
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent.h"

#define ANSWER_MS 30000

static int connect_agent(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	snprintf(address.sun_path, sizeof(address.sun_path), "%s", getenv(HOOK_SOCKET));
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
		close(fd);
		return -1;
	}
	return fd;
}

/* The agent's one-byte answer, or 0 when there is none and never will be. */
static char ask(pid_t root, pid_t criu, int timeout_ms)
{
	struct hook_report report = {root, criu};
	int fd = connect_agent();
	struct pollfd answer = {.fd = fd, .events = POLLIN};
	char word = 0;

	if (fd < 0 || send(fd, &report, sizeof(report), MSG_NOSIGNAL) != sizeof(report) ||
	    poll(&answer, 1, timeout_ms) != 1 || recv(fd, &word, 1, 0) != 1)
		return 0;
	return word;
}

static void block_all_signals(void)
{
	sigset_t all;

	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
}

static void kill_tree(pid_t criu, pid_t root)
{
	struct tree tree = {.criu = criu, .root = root};

	if (criu > 1)
		tree_stop_criu(criu);
	if (!tree_kill(tree))
		complain("tasks of the tree of %d are still there", root);
	if (criu > 1)
		kill(criu, SIGKILL);
}

static int hold(void)
{
	const char *text = getenv("CRTOOLS_INIT_PID");
	pid_t root = text ? atoi(text) : 0;
	/* Not our parent, who may be a shell between us, or dead. */
	pid_t criu = root > 1 ? tree_tracer(root) : 0;
	const char *problem;

	if (criu > 1) {
		tree_stop_criu(criu);
		oom_hide(criu); /* it would release the tree */
		oom_hide(getpid());
		/* All tasks are made, and held. */
		priority_real_time(criu);
		priority_real_time(0);
		problem = exitkill_set(criu);
		if (problem) {
			complain("%s", problem);
		} else if (ask(root, criu, -1) == HOOK_GO) {
			kill(criu, SIGCONT);
			return 0;
		}
	}
	kill_tree(criu, root);
	return 1;
}

/* Give the images that were kept from CRIU their names. */
static bool hand_out_images(void)
{
	const char *path = getenv("CRTOOLS_IMAGE_DIR");
	DIR *images = path ? opendir(path) : NULL;
	struct dirent *entry;
	int at = images ? dirfd(images) : -1;
	bool done = at >= 0;

	while (done && (entry = readdir(images))) {
		const char *name = entry->d_name;

		if (!strncmp(name, HOOK_HELD, strlen(HOOK_HELD)))
			done = renameat(at, name, at, name + strlen(HOOK_HELD)) == 0;
	}
	if (images)
		closedir(images);
	return done;
}

int hook_main(const char *action)
{
	block_all_signals();
	/* CRIU starts us without a shell between us. */
	if (!strcmp(action, "pre-restore"))
		return ask(0, getppid(), ANSWER_MS) == HOOK_GO && hand_out_images() ? 0 : 1;
	if (!strcmp(action, "pre-resume"))
		return hold();
	if (!strcmp(action, "post-restore"))
		return ask(0, 0, ANSWER_MS) == HOOK_GO ? 0 : 1;
	return 0;
}
