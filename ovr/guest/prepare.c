/*
 * The source of a move: its tree is prepared, so that only Go and Abort decide on it, of this
 * session or a later one, to this agent or the next.
 *
 * CRIU and its hook still wait, and end the tree or let it go when the agent answers. Should they be
 * gone, the cgroups alone hold the tree, and the agent ends it or lets it go itself. If the agent is
 * gone, the hook waits until the cgroups are undone or empty (hook.c).
 */
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "freeze.h"
#include "move.h"
#include "restore.h"

#define DEATH_MS 60000
#define LOOK_MS 20

bool move_id(struct session *session, const struct message *message, char id[MOVE_ID + 1])
{
	char text[MAX_STRING];

	message_str(message, KEY_MOVE, text);
	if (strlen(text) == MOVE_ID && strspn(text, "0123456789abcdef") == MOVE_ID) {
		memcpy(id, text, MOVE_ID + 1);
		return true;
	}
	session_break(session, CODE_PROTOCOL, "protocol error: invalid id of a move");
	return false;
}

static void say_prepared(struct session *session)
{
	struct writer writer = session_writer(session, OP_PREPARED);

	session_send(session, &writer);
}

/* ------------------------------------------------------------------------ prepare */

/* Of a container that is to run on after the dump, podman writes the archive before it is ended. */
static bool may_be_prepared(void)
{
	return restore.dump && (!restore.leave_running || restore.podman);
}

static void prepare_tree(struct session *session, const struct message *message)
{
	struct problem problem;
	char id[MOVE_ID + 1];

	if (!move_id(session, message, id) || !restore_in_phase(session, HELD))
		return;
	if (!may_be_prepared()) {
		session_break(session, CODE_PROTOCOL,
			      "no dump that is to end its tree, nor one of podman's");
		return;
	}
	problem = freeze_tree(id, restore.criu,
			      restore.leave_running ? restore.theirs.container : NULL);
	if (problem.text) {
		session_refuse(session, problem.code, "the tree cannot be frozen: %s",
			       problem.text);
		return;
	}
	snprintf(restore.move, sizeof(restore.move), "%s", id);
	restore.container = restore.leave_running;
	restore.phase = PREPARED;
	if (hook_say(HOOK_PREPARED))
		say_prepared(session);
	else
		restore_abort(CODE_HOOK, "the hook died");
}

bool move_hook(pid_t root, pid_t criu)
{
	return root == restore.root && criu == restore.criu && hook_say(HOOK_PREPARED);
}

void move_session_ended(void)
{
	populate_end();
	/* An adopted move has no other state than its cgroups, and what was decided. */
	if (restore.adopted && !restore.decided)
		restore_forget();
}

/* ------------------------------------------------------------------------ in doubt */

/* CRIU still holds the tree if it outlived the agent that started it. */
static void find_criu(void)
{
	pid_t criu = freeze_tracer();

	restore.theirs.end = criu ? (int)syscall(SYS_pidfd_open, criu, 0) : -1;
	if (restore.theirs.end >= 0 && freeze_tracer() == criu)
		restore.criu = criu;
	else
		close_fd(&restore.theirs.end);
}

/* A move of an earlier agent: a dump whose CRIU is not the agent's child, as an engine's is not. */
static struct problem take_over(const char *id)
{
	struct problem problem = freeze_find(id);

	if (problem.text)
		return problem;
	restore.phase = PREPARED;
	restore.dump = restore.engine = restore.adopted = restore.child_ended = true;
	restore.container = restore.packed = freeze_container()[0];
	restore.stall_ms = DEATH_MS;
	snprintf(restore.move, sizeof(restore.move), "%s", id);
	find_criu();
	return problem;
}

static void adopt_move(struct session *session, const struct message *message)
{
	struct problem problem = {.text = NULL};
	char id[MOVE_ID + 1];

	if (!move_id(session, message, id))
		return;
	if (restore.phase == IDLE)
		problem = take_over(id);
	else if (restore.phase != PREPARED || restore.owner)
		problem = (struct problem){CODE_BUSY, "a restore or dump is under way"};
	else if (strcmp(restore.move, id) != 0)
		problem = (struct problem){CODE_BUSY, "another move is in doubt"};
	if (problem.text) {
		session_refuse(session, problem.code, "%s", problem.text);
		return;
	}
	restore.owner = session;
	say_prepared(session);
}

/* If podman works it is still undecided, or may be undone, and can be adopted afterwards. */
static bool is_in_doubt(void)
{
	return !restore.owner &&
	       (restore.phase == PREPARED || restore.phase == PACKING || restore.phase == REMOVING);
}

/* The agent's own move is in doubt according to its phase, whatever its cgroups are. */
static void correct(struct moves *moves)
{
	if (!restore.dump || !restore.move[0])
		return;
	moves_remove(moves, restore.move);
	/* If all its tasks have died, it has no cgroup. */
	if (is_in_doubt())
		moves_add(moves, restore.move);
}

static void report_doubts(struct session *session)
{
	static struct moves moves;
	struct problem problem = freeze_list(&moves);
	struct writer writer;

	if (problem.text) {
		session_refuse(session, problem.code, "cannot look for moves: %s", problem.text);
		return;
	}
	correct(&moves);
	writer = session_writer(session, OP_INDOUBT);
	message_add_list(&writer, KEY_MOVES, (uint32_t)moves.count);
	for (int i = 0; i < moves.count; i++)
		message_item_str(&writer, moves.ids[i]);
	session_send(session, &writer);
}

/* ------------------------------------------------------------------------ decided */

void move_undo(void)
{
	restore.move_damaged = !freeze_undo();
}

void move_go(bool told)
{
	/* CRIU's second hook, if it comes, is told Go. */
	if (!told)
		freeze_kill();
}

bool move_work(void)
{
	if (restore.phase == REMOVING && !container_is_removed())
		return true;
	if (restore.phase != RELEASED || !restore.dump || !restore.move[0] ||
	    !(restore.adopted || restore_all_ended()))
		return false;
	if (!restore.dead_by)
		restore.dead_by = now_ms() + DEATH_MS;
	/* CRIU may have been killed before it had killed them all. */
	freeze_kill();
	if (freeze_emptied())
		restore_child_ended();
	else if (now_ms() >= restore.dead_by)
		restore_lives_on();
	return true;
}

void move_watch(struct loop *loop)
{
	if (restore.dead_by)
		loop_wake_at(loop, now_ms() + LOOK_MS);
	if (restore.phase == REMOVING && restore.late_at < LLONG_MAX)
		loop_wake_at(loop, restore.late_at);
}

/* ------------------------------------------------------------------------ destination */

static void report_outcome(struct session *session, const struct message *message)
{
	struct writer writer;
	char id[MOVE_ID + 1];

	if (!move_id(session, message, id))
		return;
	writer = session_writer(session, OP_OUTCOME);
	message_add_bool(&writer, KEY_RELEASED, moved_is_marked(id));
	message_add_bool(&writer, KEY_HELD,
			 !restore.dump && !strcmp(restore.move, id) &&
				 (restore.phase == BUILDING || restore.phase == HELD));
	session_send(session, &writer);
}

void move_message(struct session *session, const struct message *message)
{
	switch (message->op) {
	case OP_PREPARE:
		prepare_tree(session, message);
		break;
	case OP_ARCHIVE:
		container_pack(session);
		break;
	case OP_ADOPT:
		adopt_move(session, message);
		break;
	case OP_DOUBTS:
		report_doubts(session);
		break;
	default:
		report_outcome(session, message);
	}
}
