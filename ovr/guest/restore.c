/* One restore at a time: from the first image file to CRIU's end. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

#define CRIU_DEATH_MS 5000
#define MAX_DEADLINE_MS (24ll * 3600 * 1000)

enum phase {
	IDLE,
	UPLOADING,	/* image files come in */
	BUILDING,	/* CRIU runs, up to its hook */
	HELD,		/* the skeleton stands; CRIU is stopped */
	RELEASED,	/* the host said go; CRIU detaches and ends */
};

static struct restore {
	enum phase phase;
	struct session *owner;	/* NULL once its session has ended */
	struct directory directory;
	int listener, hook;
	pid_t criu, root;
	bool criu_ended, keep_log, warm;
	int criu_status;
	int64_t silence_ms, silent_at, late_at;
} restore = {.listener = -1, .hook = -1, .directory.images = -1};

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void forget(void)
{
	close_fd(&restore.listener);
	close_fd(&restore.hook);
	populate_end();
	warm_forget();
	directory_remove(&restore.directory, restore.keep_log);
	prctl(PR_SET_CHILD_SUBREAPER, 0);
	restore = (struct restore){.listener = -1, .hook = -1, .directory.images = -1};
}

static int exit_code(int status)
{
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* ------------------------------------------------------------------------ the end of a tree */

static void kill_criu(void)
{
	int64_t deadline = now_ms() + CRIU_DEATH_MS;

	if (!restore.criu_ended)
		kill(restore.criu, SIGKILL);
	while (!restore.criu_ended && now_ms() < deadline) {
		reap_children();
		sleep_ms(1);
	}
}

/* True when nothing of it is left: neither its tasks, nor CRIU. */
static bool kill_everything(void)
{
	struct tree tree = {
		.criu = restore.criu_ended ? 0 : restore.criu,
		.root = restore.root,
		.orphans = true,
	};
	bool gone;

	if (!restore.criu_ended)
		tree_stop_criu(restore.criu);
	/* The hook too: it is CRIU's child, and stopped as it is CRIU learns nothing. */
	gone = tree_kill(tree);
	kill_criu();
	/* CRIU's zombies are ours now (we are their subreaper): their pids must become free. */
	reap_children();
	return gone && restore.criu_ended;
}

static void abort_restore(const char *reason)
{
	struct session *owner = restore.owner;
	bool gone = restore.phase == UPLOADING || kill_everything();
	struct writer writer;

	complain("restore aborted: %s%s", reason, gone ? "" : "; tasks are still there");
	forget();
	if (!owner)
		return;
	writer = session_writer(owner, OP_ABORTED);
	message_add_str(&writer, KEY_REASON, reason);
	message_add_bool(&writer, KEY_GONE, gone);
	session_send(owner, &writer);
}

static void report_failure(void)
{
	struct session *owner = restore.owner;
	char lines[LOG_LINES][LOG_WIDTH];
	bool gone = kill_everything();
	int count = criu_log_errors(&restore.directory, lines);
	int status = exit_code(restore.criu_status);
	struct writer writer;
	const char *note;

	warm_served(&note);
	if (!count && restore.warm && *note)
		snprintf(lines[count++], LOG_WIDTH, "%s", note);
	complain("criu failed: %d", status);
	forget();
	if (!owner)
		return;
	writer = session_writer(owner, OP_FAILED);
	message_add_uint(&writer, KEY_STATUS, (uint64_t)status);
	message_add_list(&writer, KEY_LOG, (uint32_t)count);
	for (int i = 0; i < count; i++)
		message_item_str(&writer, lines[i]);
	message_add_bool(&writer, KEY_GONE, gone);
	session_send(owner, &writer);
}

static void report_success(void)
{
	struct session *owner = restore.owner;
	pid_t root = restore.root;
	struct writer writer;

	forget();
	if (!owner)
		return;
	writer = session_writer(owner, OP_RESTORED);
	message_add_uint(&writer, KEY_PID, (uint64_t)root);
	session_send(owner, &writer);
}

static void criu_ended(void)
{
	if (restore.phase == RELEASED && exit_code(restore.criu_status) == 0)
		report_success();
	else if (restore.phase == HELD)
		abort_restore("criu died while it held the tree");
	else
		/* In BUILDING even status 0: a tree that did not pass our hook. */
		report_failure();
}

/* ------------------------------------------------------------------------ the hook */

static void report_stopped(const uint32_t *tasks, int count)
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

static bool contains(const uint32_t *tasks, int count, pid_t task)
{
	for (int i = 0; i < count; i++)
		if (tasks[i] == (uint32_t)task)
			return true;
	return false;
}

static void tree_stands(pid_t root)
{
	static uint32_t tasks[MAX_TREE];
	int count;

	restore.phase = HELD;
	restore.root = root;
	if (!tree_stop_criu(restore.criu)) {
		abort_restore("criu does not stop");
		return;
	}
	count = tree_traced(restore.criu, tasks);
	if (!contains(tasks, count, root)) {
		abort_restore(count < 0 ? "the tree has too many threads" : "criu holds no tree");
		return;
	}
	restore.silent_at = now_ms() + restore.silence_ms;
	report_stopped(tasks, count);
}

static void on_hook(int fd, short events, void *context)
{
	struct hook_report report;
	ssize_t size;
	char word = HOOK_GO;

	(void)events, (void)context;
	if (fd != restore.hook)
		return;
	size = recv(fd, &report, sizeof(report), MSG_DONTWAIT);
	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (size <= 0) {
		close_fd(&restore.hook);
		if (restore.phase == HELD)
			abort_restore("the hook died");
		else if (restore.phase == RELEASED && !restore.criu_ended)
			/* It may have died before it could: go is go. */
			kill(restore.criu, SIGCONT);
	} else if (restore.phase != BUILDING || size != (ssize_t)sizeof(report)) {
		abort_restore("the hook makes no sense");
	} else if (report.root == 0) {
		/* post-restore: only asks whether we are there */
		send(fd, &word, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
		close_fd(&restore.hook);
	} else if (report.criu != restore.criu) {
		abort_restore("another criu than ours holds the tree");
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

static int listen_for_hook(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	int size = snprintf(address.sun_path, sizeof(address.sun_path), "%s/hook",
			    restore.directory.path);

	if (fd >= 0 && (size >= (int)sizeof(address.sun_path) ||
			bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ||
			listen(fd, 4) < 0))
		close_fd(&fd);
	return fd;
}

/* ------------------------------------------------------------------------ the host's words */

/* Refuse what comes at the wrong time; the host may have sent more behind it, so hang up. */
static bool in_phase(struct session *session, enum phase phase)
{
	if (restore.phase != IDLE && restore.owner != session)
		session_break(session, "busy: another session has a restore under way");
	else if (restore.phase == IDLE && phase == HELD)
		/* Our word that it was aborted is still on its way: that is the answer. */
		session_refuse(session, "no restore is under way");
	else if (restore.phase != phase)
		session_break(session, "not now: out of order");
	else
		return true;
	return false;
}

static void add_files(struct session *session, const struct message *message)
{
	uint32_t names_left, data_left;
	struct mp_reader names = message_list(message, KEY_NAMES, &names_left);
	struct mp_reader data = message_list(message, KEY_DATA, &data_left);
	struct mp_value name, content;
	const char *error = NULL;

	if (restore.phase == IDLE) {
		error = directory_make(&restore.directory);
		restore.phase = UPLOADING;
		restore.owner = session;
	}
	if (!in_phase(session, UPLOADING))
		return;
	if (names_left != data_left)
		error = "as many names as contents are needed";
	while (!error && names_left-- && mp_read(&names, &name) && mp_read(&data, &content))
		error = directory_append(&restore.directory, &name, &content);
	if (error)
		session_break(session, "image file refused: %s", error);
}

static int64_t deadline_ms(const struct message *message, enum key key)
{
	uint64_t ms = message_uint(message, key);

	return ms < MAX_DEADLINE_MS ? (int64_t)ms : MAX_DEADLINE_MS;
}

/* CRIU's pid, or -1 and errno. */
static pid_t start_criu(const struct message *begin)
{
	static struct criu_command command;
	pid_t pid = -1;

	if (criu_command_make(&command, &restore.directory, begin)) {
		if (begin->field[KEY_WARM_IMAGES].size)
			pid = warm_take(&restore.directory, begin, &command);
		restore.warm = pid > 0;
		if (pid < 0)
			pid = criu_start(&command);
	}
	criu_command_free(&command);
	return pid;
}

static void begin(struct session *session, const struct message *message)
{
	if (!in_phase(session, UPLOADING))
		return;
	restore.listener = listen_for_hook();
	if (restore.listener < 0) {
		session_break(session, "no socket for the hook: %s", strerror(errno));
		return;
	}
	/* Whatever outlives CRIU must not get away from us. */
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	restore.criu = start_criu(message);
	if (restore.criu < 0) {
		session_break(session, "criu cannot be started: %s", errno == ESTALE ?
			      "the agent's own program file was replaced, restart the agent" :
			      strerror(errno));
		return;
	}
	restore.phase = BUILDING;
	restore.keep_log = message_uint(message, KEY_KEEP_LOG);
	restore.silence_ms = deadline_ms(message, KEY_SILENCE_MS);
	restore.silent_at = now_ms() + restore.silence_ms;
	restore.late_at = now_ms() + deadline_ms(message, KEY_TIMEOUT_MS);
}

static void go(struct session *session)
{
	char word = HOOK_GO;

	if (!in_phase(session, HELD))
		return;
	/* The restored root becomes init's child, as after any criu restore -d. */
	prctl(PR_SET_CHILD_SUBREAPER, 0);
	populate_end();
	restore.phase = RELEASED;
	if (send(restore.hook, &word, 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 1) {
		restore.phase = HELD;
		prctl(PR_SET_CHILD_SUBREAPER, 1);
		abort_restore("the hook died");
	}
}

/* Of the tree that is held, or one of our own that map its memory. */
static bool belongs(pid_t pid)
{
	return populate_owns(pid) || (pid > 1 && tree_tracer(pid) == restore.criu);
}

static void populate(struct session *session, const struct message *message)
{
	const char *error;

	if (!in_phase(session, HELD))
		return;
	if (!belongs((pid_t)message_uint(message, KEY_PID)))
		error = "not a task of the tree";
	else
		error = populate_start(session, message);
	if (error)
		session_refuse(session, "%s", error);
}

void restore_message(struct session *session, const struct message *message)
{
	switch (message->op) {
	case OP_FILES:
		add_files(session, message);
		break;
	case OP_BEGIN:
		begin(session, message);
		break;
	case OP_TOUCH:
	case OP_MAP:
		populate(session, message);
		break;
	case OP_GO:
		go(session);
		break;
	default:
		if (restore.owner == session && restore.phase != IDLE && restore.phase != RELEASED)
			abort_restore("the host said so");
		else
			session_refuse(session, "no restore is under way");
	}
}

void restore_session_ended(struct session *session)
{
	if (restore.phase == IDLE || restore.owner != session)
		return;
	restore.owner = NULL;
	/* After "go" the tree is the guest's, whoever listens. */
	if (restore.phase != RELEASED)
		abort_restore("the link to the host broke");
}

void restore_session_heard(struct session *session)
{
	if (restore.owner == session)
		restore.silent_at = now_ms() + restore.silence_ms;
}

/* ------------------------------------------------------------------------ the loop */

bool restore_reaped(pid_t pid, int status)
{
	if (restore.phase < BUILDING || pid != restore.criu || restore.criu_ended)
		return false;
	restore.criu_ended = true;
	restore.criu_status = status;
	return true;
}

void restore_work(void)
{
	if (restore.phase < BUILDING)
		return;
	if (restore.criu_ended)
		criu_ended();
	else if (restore.phase == BUILDING && now_ms() >= restore.late_at)
		abort_restore("criu took too long to build the tree");
	else if (restore.phase != RELEASED && now_ms() >= restore.silent_at)
		abort_restore("the host was silent for too long");
}

void restore_watch(struct loop *loop)
{
	if (restore.listener >= 0)
		loop_watch(loop, restore.listener, POLLIN, on_hook_connection, NULL);
	if (restore.hook >= 0)
		loop_watch(loop, restore.hook, POLLIN, on_hook, NULL);
	if (restore.phase == BUILDING)
		loop_wake_at(loop, restore.late_at);
	if (restore.phase == BUILDING || restore.phase == HELD)
		loop_wake_at(loop, restore.silent_at);
}

void restore_shutdown(void)
{
	if (restore.phase == UPLOADING || restore.phase == BUILDING || restore.phase == HELD)
		abort_restore("the agent was told to end");
}
