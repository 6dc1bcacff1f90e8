/*
 * The hook: CRIU's action script, which is this program.
 *
 * At pre-resume CRIU holds the whole tree in ptrace stops and waits for its
 * script. However the script ends, CRIU detaches; so the hook stops CRIU first.
 * From then on neither the death of the hook nor of the agent lets a task run.
 * Then it makes the kernel kill the tree if CRIU dies (exitkill.c). The hook
 * continues CRIU only after HOOK_GO from the agent. If the connection to the
 * agent closes without it, the hook kills the tree.
 *
 * At pre-restore and post-restore, where a non-zero exit status makes CRIU give
 * up or kill the tree, the hook only checks that the agent answers. At
 * pre-restore it then renames the image withheld from an engine's CRIU (engine.c); at pre-dump,
 * that of the parent image set (engine_dump.c).
 *
 * CRIU runs the hooks of a dump twice, one after the other. It takes a post-dump script that was
 * killed by a signal for one that succeeded (cr_dump_finish() in criu/cr-dump.c looks only at the
 * exit status), and would end the tree. The second hook asks the agent whether it has said Go: if
 * not, its exit status, which CRIU adds to that of the first, lets the tree run on.
 *
 * Once the tree of a move is prepared (prepare.c), its hook outlives the agent.
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

#include "freeze.h"
#include "move.h"

#define ANSWER_MS 30000
#define LOOK_MS 50

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

/* The agent's next word, or 0 if the connection failed or closed without one. */
static char next_word(int fd, int timeout_ms)
{
	struct pollfd answer = {.fd = fd, .events = POLLIN};
	char word = 0;

	if (fd < 0 || poll(&answer, 1, timeout_ms) != 1 || recv(fd, &word, 1, 0) != 1)
		return 0;
	return word;
}

/* A connection to the agent, which has the report, or -1. */
static int report_to_agent(pid_t root, pid_t criu)
{
	struct hook_report report = {root, criu};
	int fd = connect_agent();

	if (fd >= 0 && send(fd, &report, sizeof(report), MSG_NOSIGNAL) != sizeof(report))
		close_fd(&fd);
	return fd;
}

/* The agent's one-byte answer, or 0 if the connection failed or closed without one. */
static char ask(pid_t root, pid_t criu, int timeout_ms)
{
	return next_word(report_to_agent(root, criu), timeout_ms);
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
		complain("tasks of the tree of %d are still alive", root);
	if (criu > 1)
		kill(criu, SIGKILL);
}

static int hold(void)
{
	const char *text = getenv("CRTOOLS_INIT_PID");
	pid_t root = text ? atoi(text) : 0;
	/* Not getppid(): the parent may be a shell, or dead. */
	pid_t criu = root > 1 ? tree_tracer(root) : 0;
	const char *problem;

	if (criu > 1) {
		tree_stop_criu(criu);
		oom_hide(criu); /* its death would release the tree */
		oom_hide(getpid());
		/* All tasks exist and are held: none can inherit the priority. */
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

/* Give withheld images the names that CRIU expects. */
static bool hand_out_images(const char *path)
{
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

/*
 * The tree of a move is prepared. While CRIU waits, the network of the tree stays as it locked it:
 * so without the agent, too, wait until the tree has been killed, or is no longer frozen.
 */
static char decision(int agent, pid_t root)
{
	int group = freeze_open(root);
	char word = next_word(agent, -1);

	while (!word && freeze_holds(group) && tree_task_lives(root))
		sleep_ms(LOOK_MS);
	return word;
}

/* Wait while the host reads the dumped tree's memory. Without the agent's word the tree runs on. */
static int hold_dumped(void)
{
	const char *text = getenv("CRTOOLS_INIT_PID");
	pid_t root = text ? atoi(text) : 0;
	int agent = root > 1 ? report_to_agent(root, tree_tracer(root)) : -1;
	char word = next_word(agent, -1);

	if (word == HOOK_PREPARED)
		word = decision(agent, root);
	return word == HOOK_GO ? 0 : 1;
}

/* The parent image set is beside the hook's socket (images.c). */
static bool hand_out_parent(void)
{
	char path[300], *end;

	snprintf(path, sizeof(path), "%s", getenv(HOOK_SOCKET));
	end = strrchr(path, '/');
	if (!end)
		return false;
	snprintf(end, sizeof(path) - (size_t)(end - path), "/images");
	return hand_out_images(path);
}

int hook_main(const char *action)
{
	block_all_signals();
	/* CRIU starts the hook without a shell: the parent is CRIU. */
	if (!strcmp(action, "pre-restore"))
		return ask(0, getppid(), ANSWER_MS) == HOOK_GO &&
				       hand_out_images(getenv("CRTOOLS_IMAGE_DIR")) ?
			       0 :
			       1;
	if (!strcmp(action, "pre-resume"))
		return hold();
	if (!strcmp(action, "pre-dump"))
		return ask(0, getppid(), -1) == HOOK_GO && hand_out_parent() ? 0 : 1;
	if (!strcmp(action, "post-dump"))
		return hold_dumped();
	if (!strcmp(action, "post-restore"))
		return ask(0, 0, ANSWER_MS) == HOOK_GO ? 0 : 1;
	return 0;
}
