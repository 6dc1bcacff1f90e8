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
#define ENGINE_END_MS 60000
#define MAX_DEADLINE_MS (24ll * 3600 * 1000)
#define UPLOAD_SILENCE_MS 60000	/* until "begin" says how long a host may be silent */

enum phase {
	IDLE,
	UPLOADING,	/* image files come in */
	BUILDING,	/* CRIU runs, up to its hook */
	HELD,		/* the skeleton stands; CRIU is stopped */
	RELEASED,	/* the host said go; CRIU detaches and ends */
	ENDING,		/* the tree is killed; what its engine has made of it is its to remove */
};

#define NO_RESTORE { .listener = -1, .hook = -1, .directory.images = -1, \
		     .theirs = {.end = -1, .log = -1} }

static struct restore {
	enum phase phase;
	struct session *owner;	/* NULL once its session has ended */
	struct directory directory;
	int listener, hook;
	pid_t child;		/* what we have started: CRIU, or an engine that starts it */
	pid_t criu, root;
	bool engine;
	struct engine_criu theirs;	/* the engine's CRIU, from its first word on */
	bool child_ended, keep_log, warm;
	int child_status;
	int64_t silence_ms, silent_at, late_at;
	int step;		/* ENDING: of the removal of what an engine has left */
} restore = NO_RESTORE;

/* What the host is to hear of a restore that has come to nothing. */
static struct outcome {
	bool failed;		/* by CRIU or an engine, not by us or the host */
	bool gone;
	int status, count;
	char reason[128], lines[LOG_LINES][LOG_WIDTH];
} outcome;

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void forget(void)
{
	priority_reset(0);
	close_fd(&restore.listener);
	close_fd(&restore.hook);
	populate_end();
	warm_forget();
	directory_remove(&restore.directory, restore.keep_log);
	prctl(PR_SET_CHILD_SUBREAPER, 0);
	engine_forget(&restore.theirs);
	restore = (struct restore)NO_RESTORE;
}

static int exit_code(int status)
{
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* ------------------------------------------------------------------------ the end of a tree */

static bool criu_ended(void)
{
	if (restore.engine)
		return restore.criu <= 1 || engine_criu_ended(&restore.theirs);
	return restore.child_ended;
}

static void kill_criu(void)
{
	int64_t deadline = now_ms() + CRIU_DEATH_MS;

	if (!criu_ended())
		kill(restore.criu, SIGKILL);
	while (!criu_ended() && now_ms() < deadline) {
		reap_children();
		sleep_ms(1);
	}
}

/* True when nothing of it is left: neither its tasks, nor CRIU. */
static bool kill_everything(void)
{
	struct tree tree = {
		.criu = criu_ended() ? 0 : restore.criu,
		.root = restore.root,
		.orphans = !restore.engine,
		.runtime = criu_ended() ? 0 : restore.theirs.runtime,
	};
	bool gone = true;

	if (tree.criu > 1)
		tree_stop_criu(tree.criu);
	/* The hook too: it is CRIU's child, and stopped as it is CRIU learns nothing. */
	if (tree.criu > 1 || tree.root > 1 || tree.orphans)
		gone = tree_kill(tree);
	kill_criu();
	/* CRIU's zombies are ours now (we are their subreaper): their pids must become free. */
	reap_children();
	return gone && criu_ended();
}

static void report_end(void)
{
	struct session *owner = restore.owner;
	struct outcome end = outcome;
	struct writer writer;

	complain("restore %s: %s%s", end.failed ? "failed" : "aborted", end.reason,
		 end.gone ? "" : "; tasks are still there");
	forget();
	if (!owner)
		return;
	writer = session_writer(owner, end.failed ? OP_FAILED : OP_ABORTED);
	if (end.failed) {
		message_add_uint(&writer, KEY_STATUS, (uint64_t)end.status);
		message_add_list(&writer, KEY_LOG, (uint32_t)end.count);
		for (int i = 0; i < end.count; i++)
			message_item_str(&writer, end.lines[i]);
	} else {
		message_add_str(&writer, KEY_REASON, end.reason);
	}
	message_add_bool(&writer, KEY_GONE, end.gone);
	session_send(owner, &writer);
}

/* The engine has ended, or one of those that remove what it has left. */
static void clean_up(void)
{
	pid_t pid = 0;

	while (pid == 0)
		pid = engine_clean_up(restore.step++, &restore.theirs);
	if (pid < 0) {
		report_end();
		return;
	}
	restore.child = pid;
	restore.child_ended = false;
	restore.late_at = now_ms() + ENGINE_END_MS;
}

/* The tree is dead. What an engine has made besides is to go, too. */
static void end_restore(void)
{
	if (!restore.engine || restore.phase == UPLOADING) {
		report_end();
		return;
	}
	/*
	 * The engine sees that its CRIU failed; if it has not come to CRIU yet,
	 * the hook that gets no answer makes CRIU give up.
	 */
	close_fd(&restore.hook);
	populate_end();
	restore.phase = ENDING;
	restore.late_at = now_ms() + ENGINE_END_MS;
	if (restore.child_ended)
		clean_up();
}

static void abort_restore(const char *reason)
{
	outcome = (struct outcome){.gone = restore.phase == UPLOADING || kill_everything()};
	snprintf(outcome.reason, sizeof(outcome.reason), "%s", reason);
	end_restore();
}

static void engine_too_late(void)
{
	complain("the container engine does not end; it is killed");
	kill(restore.child, SIGKILL);
	restore.late_at = now_ms() + ENGINE_END_MS;
}

static void report_failure(void)
{
	/* After "go" the tree is the engine's, and so is cleaning up. */
	bool released = restore.engine && restore.phase == RELEASED;
	const char *note;

	outcome = (struct outcome){
		.failed = true, .gone = released || kill_everything(),
		.status = exit_code(restore.child_status),
	};
	outcome.count = restore.engine ?
		engine_log_errors(&restore.directory, &restore.theirs, outcome.lines) :
		criu_log_errors(&restore.directory, outcome.lines);
	warm_served(&note);
	if (!outcome.count && restore.warm && *note)
		snprintf(outcome.lines[outcome.count++], LOG_WIDTH, "%s", note);
	snprintf(outcome.reason, sizeof(outcome.reason), "%s ended with status %d",
		 restore.engine ? "the container engine" : "criu", outcome.status);
	if (released)
		report_end();
	else
		end_restore();
}

static void report_success(void)
{
	struct session *owner = restore.owner;
	pid_t root = restore.root;
	char container[LOG_WIDTH] = "";
	struct writer writer;

	if (restore.engine)
		engine_result(&restore.directory, container);
	forget();
	if (!owner)
		return;
	writer = session_writer(owner, OP_RESTORED);
	message_add_uint(&writer, KEY_PID, (uint64_t)root);
	if (container[0])
		message_add_str(&writer, KEY_CONTAINER, container);
	session_send(owner, &writer);
}

static void child_ended(void)
{
	if (restore.phase == ENDING)
		clean_up();
	else if (restore.phase == RELEASED && exit_code(restore.child_status) == 0)
		report_success();
	else if (restore.phase == HELD)
		abort_restore(restore.engine ? "the container engine ended before the restore" :
					       "criu died while it held the tree");
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

/* The first word of an engine's CRIU, before it has made a task. */
static bool adopt(pid_t criu)
{
	if (!restore.engine || restore.criu > 1)
		return !restore.engine || criu == 0 || criu == restore.criu;
	restore.theirs = engine_adopt(criu);
	if (restore.theirs.end < 0)
		return false;
	restore.criu = criu;
	return true;
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
		else if (restore.phase == RELEASED && !criu_ended())
			/* It may have died before it could: go is go. */
			kill(restore.criu, SIGCONT);
	} else if (restore.phase == ENDING) {
		close_fd(&restore.hook);
	} else if (restore.phase != BUILDING || size != (ssize_t)sizeof(report)) {
		abort_restore("the hook makes no sense");
	} else if (report.root == 0 && !adopt(report.criu)) {
		abort_restore("another criu than the engine's runs our hook");
	} else if (report.root == 0) {
		/* pre-restore, post-restore: only asks whether we are there */
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
	else if (restore.phase == ENDING && phase == HELD)
		return false;	/* our word that it was aborted will be the answer */
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
		restore.silence_ms = UPLOAD_SILENCE_MS;
		restore.silent_at = now_ms() + restore.silence_ms;
	}
	if (!in_phase(session, UPLOADING))
		return;
	if (names_left != data_left)
		error = "as many names as contents are needed";
	while (!error && names_left-- && mp_read(&names, &name) && mp_read(&data, &content))
		error = directory_append(&restore.directory, &name, &content);
	if (error)
		session_break(session, "image files cannot be taken: %s", error);
}

static int64_t deadline_ms(const struct message *message, enum key key)
{
	uint64_t ms = message_uint(message, key);

	return ms < MAX_DEADLINE_MS ? (int64_t)ms : MAX_DEADLINE_MS;
}

static bool known_engine(const struct message *message)
{
	char name[MAX_STRING];

	if (!message_has(message, KEY_ENGINE))
		return true;
	message_str(message, KEY_ENGINE, name);
	return engine_known(name);
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
		if (pid < 0) {
			pid = criu_start(&command);
			if (pid > 0)
				priority_raise(pid);
		}
	}
	criu_command_free(&command);
	return pid;
}

static void begin(struct session *session, const struct message *message)
{
	if (!in_phase(session, UPLOADING))
		return;
	if (!known_engine(message)) {
		session_break(session, "no container engine that the agent knows");
		return;
	}
	restore.listener = listen_for_hook();
	if (restore.listener < 0) {
		session_break(session, "no socket for the hook: %s", strerror(errno));
		return;
	}
	restore.engine = message_has(message, KEY_ENGINE);
	/* Whatever outlives CRIU must not get away from us. What outlives an engine is its own. */
	prctl(PR_SET_CHILD_SUBREAPER, !restore.engine);
	restore.child = restore.engine ? engine_start(&restore.directory, message) :
					 start_criu(message);
	if (restore.child < 0) {
		session_break(session, "%s cannot be started: %s",
			      restore.engine ? "the container engine" : "criu", errno == ESTALE ?
			      "the agent's own program file was replaced, restart the agent" :
			      strerror(errno));
		return;
	}
	/* Only now: an engine leaves processes behind, which would inherit it. */
	priority_raise(0);
	restore.criu = restore.engine ? 0 : restore.child;
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
	if (!restore.engine)
		priority_reset(restore.criu);
	restore.phase = RELEASED;
	if (send(restore.hook, &word, 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 1) {
		restore.phase = HELD;
		prctl(PR_SET_CHILD_SUBREAPER, !restore.engine);
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
		if (restore.owner == session && restore.phase == ENDING)
			break;	/* the answer will come */
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
	if (restore.phase != RELEASED && restore.phase != ENDING)
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
	if (restore.phase < BUILDING || pid != restore.child || restore.child_ended)
		return false;
	restore.child_ended = true;
	restore.child_status = status;
	return true;
}

static bool host_must_speak(void)
{
	return restore.phase == UPLOADING || restore.phase == BUILDING || restore.phase == HELD;
}

void restore_work(void)
{
	if (restore.phase == IDLE)
		return;
	if (restore.child_ended)
		child_ended();
	else if (restore.phase == HELD && criu_ended())
		abort_restore("criu died while it held the tree");
	else if (restore.phase == BUILDING && now_ms() >= restore.late_at)
		abort_restore("criu took too long to build the tree");
	else if (restore.phase == ENDING && now_ms() >= restore.late_at)
		engine_too_late();
	else if (host_must_speak() && now_ms() >= restore.silent_at)
		abort_restore("the host was silent for too long");
}

/* Nothing to do but to look again. */
static void on_criu_end(int fd, short events, void *context)
{
	(void)fd, (void)events, (void)context;
}

void restore_watch(struct loop *loop)
{
	if (restore.listener >= 0)
		loop_watch(loop, restore.listener, POLLIN, on_hook_connection, NULL);
	if (restore.hook >= 0)
		loop_watch(loop, restore.hook, POLLIN, on_hook, NULL);
	if (restore.phase == HELD && restore.theirs.end >= 0)
		loop_watch(loop, restore.theirs.end, POLLIN, on_criu_end, NULL);
	if (restore.phase == BUILDING || restore.phase == ENDING)
		loop_wake_at(loop, restore.late_at);
	if (host_must_speak())
		loop_wake_at(loop, restore.silent_at);
}

void restore_shutdown(void)
{
	if (restore.phase == UPLOADING || restore.phase == BUILDING || restore.phase == HELD)
		abort_restore("the agent was told to end");
}
