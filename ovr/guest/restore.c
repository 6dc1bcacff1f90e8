/* One restore or dump at a time: messages of its session, and deadlines. */
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/prctl.h>

#include "freeze.h"
#include "restore.h"

#define MAX_DEADLINE_MS (24ll * 3600 * 1000)
#define UPLOAD_SILENCE_MS 60000 /* until Begin sets silence_ms */
#define UNREAD_INPUT_MS 1000
#define LINGER_MS 10000

#define NO_RESTORE                                                                                 \
	{.listener = -1,                                                                           \
	 .hook = -1,                                                                               \
	 .directory = {.images = -1, .dump = -1},                                                  \
	 .theirs = {.end = -1, .log = -1}}

struct restore restore = NO_RESTORE;
static int64_t stop_at; /* when to exit; 0: the agent was not asked to */

void restore_forget(void)
{
	close_fd(&restore.listener);
	close_fd(&restore.hook);
	populate_end();
	warm_forget();
	dump_forget();
	directory_remove(&restore.directory, restore.keep_log);
	prctl(PR_SET_CHILD_SUBREAPER, 0);
	engine_forget(&restore.theirs);
	restore = (struct restore)NO_RESTORE;
}

/* ------------------------------------------------------------------------ messages */

bool restore_in_phase(struct session *session, enum phase phase)
{
	if (restore.phase != IDLE && restore.owner != session)
		session_break(session, CODE_BUSY, "busy: %s",
			      restore.owner || restore.phase != PREPARED ?
				      "another session has a restore or dump under way" :
				      "a move from this guest is in doubt");
	else if (restore.phase == ENDING && phase >= TRACKING)
		return false; /* Aborted is the answer, and follows */
	else if (restore.phase == IDLE && phase >= TRACKING)
		/* The host has not read Aborted yet, and will take it for the answer. */
		session_refuse(session, CODE_IDLE, "no restore or dump is under way");
	else if (restore.phase != phase)
		session_break(session, CODE_PROTOCOL, "message out of order");
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
	struct problem problem = {.text = NULL};

	if (restore.phase == IDLE) {
		problem = directory_make(&restore.directory);
		restore.phase = UPLOADING;
		restore.owner = session;
		restore.silence_ms = UPLOAD_SILENCE_MS;
		restore.silent_at = now_ms() + restore.silence_ms;
	}
	/* A dump's host may add what the parent image set lacks. */
	if (restore.phase != TRACKING && !restore_in_phase(session, UPLOADING))
		return;
	if (restore.phase == TRACKING && !restore_in_phase(session, TRACKING))
		return;
	if (names_left != data_left)
		problem =
			(struct problem){CODE_PROTOCOL, "the numbers of names and contents differ"};
	while (!problem.text && names_left-- && mp_read(&names, &name) && mp_read(&data, &content))
		problem = directory_append(&restore.directory, &name, &content);
	if (problem.text)
		session_break(session, problem.code, "cannot store image files: %s", problem.text);
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

/* Returns CRIU's pid, or -1 and errno. */
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
		if (pid > 0)
			priority_raise(pid);
	}
	criu_command_free(&command);
	return pid;
}

void restore_refuse_start(struct session *session, int error)
{
	const char *what = restore.engine ? "the container engine" : "criu";
	enum code code = code_of_errno(error);

	if (error == ESTALE)
		session_break(session, CODE_REPLACED,
			      "%s cannot be started: the agent's own program"
			      " file was replaced",
			      what);
	else
		session_break(session, code == CODE_SYSTEM ? CODE_START : code,
			      "%s cannot be started: %s", what, strerror(error));
}

void restore_building(const struct message *begin)
{
	priority_raise(0);
	restore.criu = restore.engine ? 0 : restore.child;
	restore.phase = BUILDING;
	restore.keep_log = message_uint(begin, KEY_KEEP_LOG);
	restore.silence_ms = deadline_ms(begin, KEY_SILENCE_MS);
	restore.silent_at = now_ms() + restore.silence_ms;
	restore.late_at = message_has(begin, KEY_TIMEOUT_MS) ?
				  now_ms() + deadline_ms(begin, KEY_TIMEOUT_MS) :
				  LLONG_MAX;
	restore.stall_ms = deadline_ms(begin, KEY_STALL_MS);
	progress_begin(restore.stall_ms);
}

static void begin(struct session *session, const struct message *message)
{
	if (!restore_in_phase(session, UPLOADING))
		return;
	if (!known_engine(message)) {
		session_break(session, CODE_ENGINE, "unknown container engine");
		return;
	}
	if (message_has(message, KEY_MOVE) && !move_id(session, message, restore.move))
		return;
	if (!hook_listen()) {
		session_break(session, code_of_errno(errno), "cannot create the hook's socket: %s",
			      strerror(errno));
		return;
	}
	restore.engine = message_has(message, KEY_ENGINE);
	/* Adopt tasks that outlive CRIU, so that they can be killed. An engine's are its own. */
	prctl(PR_SET_CHILD_SUBREAPER, !restore.engine);
	restore.child =
		restore.engine ? engine_start(&restore.directory, message) : start_criu(message);
	if (restore.child < 0) {
		restore_refuse_start(session, errno);
		return;
	}
	restore_building(message);
}

/* A task of the held tree, or a worker that maps its memory. */
static bool belongs(uint64_t pid)
{
	if (pid <= 1 || pid > INT_MAX)
		return false;
	if (populate_owns((pid_t)pid))
		return true;
	return restore.packed ? freeze_owns((pid_t)pid) : tree_tracer((pid_t)pid) == restore.criu;
}

/* A container's memory is read when its archive was made: pages may have gone to swap. */
static bool may_populate(struct session *session, const struct message *message)
{
	bool packed = restore.phase == PREPARED && restore.packed && message->op == OP_TOUCH;

	return restore_in_phase(session, packed ? PREPARED : HELD);
}

static bool all_belong(const struct message *message)
{
	uint32_t count;
	struct mp_reader portions;
	struct portion portion;
	uint64_t good = 0;

	if (message->op == OP_MAP)
		return belongs(message_uint(message, KEY_PID));
	portions = message_list(message, KEY_PORTIONS, &count);
	while (read_portion(&portions, &portion)) {
		/* A dump's tree is to run on with the memory that it has. */
		if (restore.dump && portion.how != TOUCH_READ && !populate_owns((pid_t)portion.pid))
			return false;
		if (!portion.pid || (portion.pid != good && !belongs(portion.pid)))
			return false;
		good = portion.pid;
	}
	return true;
}

static void populate(struct session *session, const struct message *message)
{
	struct problem problem = {CODE_TASK, "not a task of the tree"};

	if (!may_populate(session, message))
		return;
	if (all_belong(message))
		problem = populate_start(session, message);
	if (problem.text)
		session_refuse(session, problem.code, "%s", problem.text);
}

static void abort_by_host(struct session *session)
{
	if (restore.owner != session || restore.phase == IDLE || restore.phase == RELEASED)
		session_refuse(session, CODE_IDLE, "no restore or dump is under way");
	else if (restore.decided)
		/* Another tree runs. */
		session_break(session, CODE_PROTOCOL, "message out of order");
	else if (restore.phase != ENDING) /* else the answer follows */
		restore_abort(CODE_HOST, "aborted by the host");
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
	case OP_FREEZE:
		dump_freeze(session);
		break;
	case OP_TRACK:
		dump_track(session, message);
		break;
	case OP_DUMP:
		dump_begin(session, message);
		break;
	case OP_FETCH:
		dump_fetch(session, message);
		break;
	case OP_TOUCH:
	case OP_MAP:
		populate(session, message);
		break;
	case OP_GO:
		restore_go(session);
		break;
	default:
		abort_by_host(session);
	}
}

void restore_session_ended(struct session *session)
{
	if (restore.phase == IDLE || restore.owner != session)
		return;
	restore.owner = NULL;
	if (restore.phase == PREPARED) {
		move_session_ended();
		return;
	}
	/* Later the tree belongs to the guest, with or without a session. */
	if (restore.phase <= HELD)
		restore_abort(CODE_LINK, "the link to the host broke");
}

void restore_session_heard(struct session *session)
{
	if (restore.owner != session)
		return;
	restore.silent_at = now_ms() + restore.silence_ms;
	restore.grace = false;
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
	return restore.phase >= UPLOADING && restore.phase <= HELD;
}

/* The agent may have stood still itself: input that arrived meanwhile gets a moment to be read. */
static bool host_is_silent(void)
{
	if (!host_must_speak() || now_ms() < restore.silent_at)
		return false;
	if (restore.grace || !restore.owner || !session_has_input(restore.owner))
		return true;
	restore.grace = true;
	restore.silent_at = now_ms() + UNREAD_INPUT_MS;
	return false;
}

/* CRIU waits for one of its hooks. */
static bool criu_waits(void)
{
	return restore.phase >= TRACKING && restore.phase <= HELD;
}

void restore_work(void)
{
	if (restore.phase == IDLE || restore.phase == PREPARED || move_work())
		return;
	if (restore_all_ended())
		restore_child_ended();
	else if (archive_is_awaited() && now_ms() >= restore.silent_at)
		archive_host_is_silent();
	else if (criu_waits() && restore_criu_ended())
		restore_abort(CODE_CRIU, restore.phase == TRACKING ?
						 "criu died before it stopped the tree" :
						 "criu died while it held the tree");
	else if (restore.phase == BUILDING && now_ms() >= restore.late_at)
		restore_abort(CODE_TIMEOUT, "criu took longer than the given timeout");
	else if (restore.phase == BUILDING && progress_stalled())
		restore_abort(CODE_STALLED, "criu makes no progress");
	else if (restore.phase == ENDING && now_ms() >= restore.late_at)
		restore_end_too_late();
	else if (host_is_silent())
		restore_abort(CODE_SILENT, "the host was silent for too long");
	else if (restore.phase == SAVING)
		dump_send_images();
}

/* Wakes the loop: restore_work() checks for CRIU's exit. */
static void on_criu_end(int fd, short events, void *context)
{
	(void)events, (void)context;
	restore.criu_end_seen |= fd == restore.theirs.end;
}

/* Until it is seen: a pidfd stays readable, and what follows may be a decision, or the archive. */
static bool criu_end_matters(void)
{
	return restore.theirs.end >= 0 && !restore.criu_end_seen &&
	       (criu_waits() || (restore.child_ended && restore.dump && restore.phase != PREPARED));
}

void restore_rest(void)
{
	if (restore.phase == IDLE || (restore.phase == PREPARED && !restore.owner))
		priority_reset(0);
}

void restore_watch(struct loop *loop)
{
	hook_watch(loop);
	archive_watch(loop);
	if (criu_end_matters())
		loop_watch(loop, restore.theirs.end, POLLIN, on_criu_end, NULL);
	if ((restore.phase == BUILDING || restore.phase == ENDING) && restore.late_at < LLONG_MAX)
		loop_wake_at(loop, restore.late_at);
	if (restore.phase == BUILDING)
		loop_wake_at(loop, progress_look_at());
	if (host_must_speak())
		loop_wake_at(loop, restore.silent_at);
	/* All output was written: nothing else wakes the loop. */
	if (restore.phase == SAVING && session_has_room(restore.owner))
		loop_wake_at(loop, now_ms());
	if (archive_is_awaited())
		loop_wake_at(loop, restore.silent_at);
	move_watch(loop);
	if (stop_at)
		loop_wake_at(loop, restore_lingers() ? stop_at : now_ms());
}

void restore_shutdown(void)
{
	if (!stop_at)
		stop_at = now_ms() + LINGER_MS;
	if (host_must_speak())
		restore_abort(CODE_AGENT, "the agent is shutting down");
}

bool restore_lingers(void)
{
	return restore.dump && restore.phase >= BUILDING && restore.phase != PREPARED &&
	       (!stop_at || now_ms() < stop_at);
}
