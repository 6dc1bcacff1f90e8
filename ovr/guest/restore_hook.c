/* The agent's side of the hook (hook.c): accept its reports, and answer them. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "restore.h"

/* The threads that CRIU holds. */
static uint32_t tasks[MAX_TREE];
static int count;

void hook_report_stopped(void)
{
	struct writer writer = session_writer(restore.owner, OP_STOPPED);
	const char *note;

	message_add_uint(&writer, KEY_ROOT_PID, (uint64_t)restore.root);
	message_add_uint(&writer, KEY_CRIU_PID, (uint64_t)restore.criu);
	message_add_list(&writer, KEY_TASKS, (uint32_t)count);
	for (int i = 0; i < count; i++)
		message_item_uint(&writer, tasks[i]);
	message_add_uint(&writer, KEY_WARM, warm_served(&note));
	message_add_str(&writer, KEY_NOTE, note);
	session_send(restore.owner, &writer);
}

static bool holds(pid_t task)
{
	for (int i = 0; i < count; i++)
		if (tasks[i] == (uint32_t)task)
			return true;
	return false;
}

static void tree_stands(pid_t root)
{
	restore.phase = restore.dump ? SAVING : HELD;
	restore.root = root;
	if (restore.dump && root != restore.dumped) {
		restore_abort(CODE_TREE, "criu has dumped another tree");
		return;
	}
	/* If a dump's CRIU dies at its hook the tree runs on, as it should. */
	if (!restore.dump && !tree_stop_criu(restore.criu)) {
		restore_abort(CODE_CRIU, "criu does not stop");
		return;
	}
	count = tree_traced(restore.criu, tasks);
	if (!holds(root)) {
		restore_abort(CODE_TREE,
			      count < 0 ? "the tree has too many threads" : "criu holds no tree");
		return;
	}
	restore.silent_at = now_ms() + restore.silence_ms;
	if (!restore.dump)
		hook_report_stopped();
}

void hook_reset_priorities(void)
{
	priority_reset(restore.criu);
	/* CRIU sets the nice value of tasks, but not of zombies, which keep CRIU's. */
	tree_renice_zombies((struct tree){.root = restore.root}, priority_before());
	/* The pool's library has raised the priority of each session of the tree. */
	for (int i = 0; restore.warm && i < count; i++)
		priority_reset((pid_t)tasks[i]);
}

/* The first report of an engine's CRIU, before it has created a task. */
static bool adopt(pid_t criu)
{
	if (!restore.engine || restore.criu > 1)
		return !restore.engine || criu == 0 || criu == restore.criu;
	if (restore.dump && !tree_descends(criu, restore.child))
		return false;
	restore.theirs = engine_adopt(criu, restore.dump ? "dump.log" : "restore.log");
	if (restore.theirs.end < 0)
		return false;
	restore.criu = criu;
	if (restore.dump)
		oom_hide(criu); /* as in start_dump() */
	return !restore.dump || engine_open_images(&restore.directory, criu);
}

bool hook_say(char word)
{
	return send(restore.hook, &word, 1, MSG_NOSIGNAL | MSG_DONTWAIT) == 1;
}

/* pre-dump, pre-restore or post-restore */
static void no_tree_yet(void)
{
	if (restore.dump && !restore.tracked) {
		dump_starts();
		return;
	}
	/* The agent's presence is enough. */
	hook_say(HOOK_GO);
	close_fd(&restore.hook);
}

static void on_hook(int fd, short events, void *context)
{
	struct hook_report report;
	ssize_t size;

	(void)events, (void)context;
	if (fd != restore.hook)
		return;
	size = recv(fd, &report, sizeof(report), MSG_DONTWAIT);
	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (size <= 0) {
		close_fd(&restore.hook);
		if (restore.phase >= TRACKING && restore.phase <= HELD)
			restore_abort(CODE_HOOK, "the hook died");
		else if (restore.phase == RELEASED && !restore_criu_ended())
			/* Even if it died before that: Go was received. */
			kill(restore.criu, SIGCONT);
	} else if (restore.phase == PREPARED) {
		/* The second post-dump hook, too early */
		if (size != (ssize_t)sizeof(report) || !move_hook(report.root, report.criu))
			close_fd(&restore.hook);
	} else if (restore.phase == ENDING) {
		/* It will give up; its directory and its log are looked at afterwards. */
		if (restore.dump && size == (ssize_t)sizeof(report) && report.root == 0)
			adopt(report.criu);
		close_fd(&restore.hook);
	} else if ((restore.phase == RELEASED || restore.phase == PACKING) && restore.dump) {
		/* The second post-dump hook */
		hook_say(HOOK_GO);
		close_fd(&restore.hook);
	} else if (restore.phase != BUILDING || size != (ssize_t)sizeof(report)) {
		restore_abort(CODE_HOOK, "invalid report from the hook");
	} else if (report.root == 0 && !adopt(report.criu)) {
		restore_abort(CODE_CRIU, "the hook was run by another criu than the engine's");
	} else if (report.root == 0) {
		no_tree_yet();
	} else if (report.criu != restore.criu) {
		restore_abort(CODE_CRIU, "the tree is held by another criu than the agent's");
	} else {
		tree_stands(report.root);
	}
}

static void on_hook_connection(int fd, short events, void *context)
{
	int hook;

	(void)events, (void)context;
	if (fd != restore.listener)
		return;
	hook = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (hook >= 0 && restore.hook >= 0)
		close(hook);
	else
		restore.hook = hook;
}

bool hook_listen(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int size = snprintf(address.sun_path, sizeof(address.sun_path), "%s/hook",
			    restore.directory.path);

	if (fd >= 0 &&
	    (size >= (int)sizeof(address.sun_path) ||
	     bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 4) < 0))
		close_fd(&fd);
	restore.listener = fd;
	return fd >= 0;
}

void hook_watch(struct loop *loop)
{
	if (restore.listener >= 0)
		loop_watch(loop, restore.listener, POLLIN, on_hook_connection, NULL);
	if (restore.hook >= 0)
		loop_watch(loop, restore.hook, POLLIN, on_hook, NULL);
}
