/*
 * Every end of a restore or dump, and its report to the host. The tree of a
 * restore is killed or left to the guest, and an engine removes its container.
 * The tree of a dump runs on, unless the dump was committed.
 */
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include "restore.h"

#define CRIU_DEATH_MS 5000
#define END_MS 60000 /* for an engine, a cleanup step or a dump's CRIU */

/* The report of a failed or aborted restore or dump. */
static struct outcome {
	bool failed; /* by CRIU or an engine, not by the agent or the host */
	bool undone; /* no task of a restore's tree is left; a dump's tree runs on, whole */
	int status, count;
	enum code code;
	char reason[128], lines[LOG_LINES][LOG_WIDTH];
} outcome;

static int exit_code(int status)
{
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

bool restore_criu_ended(void)
{
	if (restore.engine)
		return restore.criu <= 1 || engine_criu_ended(&restore.theirs);
	return restore.child_ended;
}

bool restore_all_ended(void)
{
	if (!restore.child_ended || !restore.engine || !restore.dump)
		return restore.child_ended;
	/* Without its engine CRIU still ends the tree, or lets it run on. */
	if (restore.phase == RELEASED || restore.phase == PACKING)
		return restore_criu_ended() && archive_is_sent();
	return restore.phase != ENDING || restore_criu_ended();
}

struct tree restore_tree(void)
{
	/* After CRIU's exit its pids may be reused. */
	bool ended = restore_criu_ended();

	return (struct tree){
		.criu = ended ? 0 : restore.criu,
		.root = restore.root,
		.orphans = !restore.engine,
		.runtime = ended ? 0 : restore.theirs.runtime,
	};
}

static void kill_criu(void)
{
	int64_t deadline = now_ms() + CRIU_DEATH_MS;

	if (!restore_criu_ended())
		kill(restore.criu, SIGKILL);
	while (!restore_criu_ended() && now_ms() < deadline) {
		reap_children();
		sleep_ms(1);
	}
}

/* True if all tasks and CRIU are gone. */
static bool kill_everything(void)
{
	struct tree tree = restore_tree();
	bool gone = true;

	if (tree.criu > 1)
		tree_stop_criu(tree.criu);
	/* Including the hook, a child of CRIU, which is stopped and does not notice. */
	if (tree.criu > 1 || tree.root > 1 || tree.orphans)
		gone = tree_kill(tree);
	kill_criu();
	/* Reap CRIU's zombies as their subreaper: their pids must become free. */
	reap_children();
	return gone && restore_criu_ended();
}

static void send_outcome(struct session *owner)
{
	struct writer writer;

	if (!owner)
		return;
	writer = session_writer(owner, outcome.failed ? OP_FAILED : OP_ABORTED);
	if (outcome.failed) {
		message_add_uint(&writer, KEY_STATUS, (uint64_t)outcome.status);
		message_add_list(&writer, KEY_LOG, (uint32_t)outcome.count);
		for (int i = 0; i < outcome.count; i++)
			message_item_str(&writer, outcome.lines[i]);
	} else {
		message_add_str(&writer, KEY_CODE, code_name(outcome.code));
		message_add_str(&writer, KEY_REASON, outcome.reason);
	}
	message_add_bool(&writer, KEY_UNDONE, outcome.undone);
	session_send(owner, &writer);
}

static void report_end(void)
{
	struct session *owner = restore.owner;
	const char *left = "";

	if (!outcome.undone)
		left = restore.dump ? "; the tree may be damaged" :
				      "; some of its tasks are still alive";
	complain("%s %s: %s%s", restore.dump ? "dump" : "restore",
		 outcome.failed ? "failed" : "aborted", outcome.reason, left);
	restore_forget();
	send_outcome(owner);
}

void restore_lives_on(void)
{
	outcome = (struct outcome){.code = CODE_CGROUP};
	snprintf(outcome.reason, sizeof(outcome.reason), "its processes do not end");
	report_end();
}

/* CRIU has exited after the abort of a dump. */
static void dump_ended(void)
{
	size_t used = strlen(outcome.reason);

	outcome.undone = dump_is_whole();
	if (!outcome.failed && !outcome.undone && outcome.code != CODE_CRIU) {
		outcome.code = CODE_CRIU;
		snprintf(outcome.reason + used, sizeof(outcome.reason) - used, "; criu was killed");
	}
	report_end();
}

/* The engine or a cleanup step has exited: start the next step. */
static void clean_up(void)
{
	pid_t pid = 0;

	if (restore.dump) {
		dump_ended();
		return;
	}
	while (pid == 0)
		pid = engine_clean_up(restore.step++, &restore.theirs);
	if (pid < 0) {
		report_end();
		return;
	}
	restore.child = pid;
	restore.child_ended = false;
	restore.late_at = now_ms() + END_MS;
}

/*
 * A restore's tree is dead: let the engine end, then remove its container. A
 * dump's CRIU has parasite code in the tree until it runs its hook, and must not
 * be killed: the hook gets no answer, which makes it release the tree.
 */
static void end_restore(void)
{
	if (!(restore.engine || restore.dump) || restore.phase == UPLOADING) {
		report_end();
		return;
	}
	/*
	 * The engine notices that its CRIU failed. If it has not started CRIU
	 * yet, the hook will get no answer and make CRIU give up.
	 */
	close_fd(&restore.hook);
	populate_end();
	track_end();
	restore.phase = ENDING;
	restore.late_at =
		now_ms() + (restore.dump && restore.stall_ms < END_MS ? restore.stall_ms : END_MS);
	if (restore_all_ended())
		clean_up();
}

void restore_abort(enum code code, const char *reason)
{
	if (restore.phase == PREPARED || restore.phase == PACKING)
		move_undo();
	outcome = (struct outcome){
		.undone = restore.phase == UPLOADING || restore.dump || kill_everything(),
		.code = code,
	};
	snprintf(outcome.reason, sizeof(outcome.reason), "%s", reason);
	/* After Go, too: a moved tree that was killed is to run in its source again. */
	if (restore.phase == RELEASED && !restore.dump && restore.move[0] && outcome.undone)
		moved_unmark(restore.move);
	end_restore();
}

/* Its CRIU must not be killed: the host is told, and no restore or dump begins until it exits. */
static void dump_too_late(void)
{
	size_t used = strlen(outcome.reason);

	snprintf(outcome.reason + used, sizeof(outcome.reason) - used, "; criu (%d) does not end",
		 restore.criu);
	complain("dump aborted: %s", outcome.reason);
	outcome.code = CODE_HANGS;
	outcome.undone = false;
	send_outcome(restore.owner);
	restore.owner = NULL;
	restore.late_at = LLONG_MAX;
}

/* An engine whose CRIU has ended is of no more use to the tree of a dump. */
static bool engine_may_be_killed(void)
{
	return !restore.dump || (restore.engine && restore.criu > 1 && restore_criu_ended() &&
				 !restore.engine_killed);
}

void restore_end_too_late(void)
{
	if (!engine_may_be_killed()) {
		dump_too_late();
		return;
	}
	if (restore.engine_killed) {
		outcome.undone = false;
		report_end();
		return;
	}
	complain("the container engine does not exit; killing it");
	kill(restore.child, SIGKILL);
	restore.engine_killed = true;
	restore.late_at = now_ms() + END_MS;
}

/* False if it was not told so. */
static bool say_go(enum phase phase)
{
	/* The restored root becomes a child of init, as after any `criu restore -d`. */
	prctl(PR_SET_CHILD_SUBREAPER, 0);
	/* The host goes on reading a container's memory when its archive is made. */
	if (phase == RELEASED)
		populate_end();
	if (!restore.engine && !restore.dump)
		hook_reset_priorities();
	restore.phase = phase;
	if (restore.engine && restore.dump && !restore.adopted)
		engine_strip_images(&restore.directory);
	restore.dump_released = restore.dump && hook_say(HOOK_GO);
	if (restore.dump_released)
		close_fd(&restore.hook); /* a second one follows */
	return restore.dump ? restore.dump_released : hook_say(HOOK_GO);
}

void restore_pack(void)
{
	/* If its hook is dead, CRIU runs another one, or ends. */
	say_go(PACKING);
}

/* A restored tree that is moved here may run from the moment that this is recorded. */
static bool may_run(void)
{
	return restore.dump || !restore.move[0] || moved_mark(restore.move);
}

void restore_go(struct session *session)
{
	bool prepared = restore.phase == PREPARED, told;

	if (!restore_in_phase(session, prepared ? PREPARED : HELD))
		return;
	if (prepared && restore.container) {
		container_go(session);
		return;
	}
	if (!may_run()) {
		restore_abort(CODE_OUTCOME, "cannot record that the moved tree runs");
		return;
	}
	told = say_go(RELEASED);
	if (prepared) {
		/* Another tree runs: there is no way back. */
		move_go(told);
	} else if (!told) {
		restore.phase = HELD;
		prctl(PR_SET_CHILD_SUBREAPER, !restore.engine && !restore.dump);
		if (!restore.dump && restore.move[0])
			moved_unmark(restore.move);
		restore_abort(CODE_HOOK, "the hook died");
	}
}

static void report_failure(void)
{
	/* After Go tree and cleanup are the engine's. */
	bool released = restore.engine && restore.phase == RELEASED;
	const char *note;

	outcome = (struct outcome){
		.failed = true,
		.undone = released ? !restore.dump || dump_runs_on() :
				     restore.dump || kill_everything(),
		.status = exit_code(restore.child_status),
	};
	outcome.count = restore.engine ? engine_log_errors(&restore.directory, &restore.theirs,
							   outcome.lines) :
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
	restore_forget();
	if (!owner)
		return;
	writer = session_writer(owner, OP_RESTORED);
	message_add_uint(&writer, KEY_PID, (uint64_t)root);
	if (container[0])
		message_add_str(&writer, KEY_CONTAINER, container);
	session_send(owner, &writer);
}

/* However CRIU has ended, its tree has been killed. */
static bool prepared_without_engine(void)
{
	return restore.dump && restore.move[0] && !restore.engine;
}

/* The host has the archive; or podman or CRIU failed, and the tree runs on. */
static void pack_ended(void)
{
	if (exit_code(restore.child_status) == 0 || !restore.owner) {
		container_packed();
		return;
	}
	move_undo();
	report_failure();
}

void restore_child_ended(void)
{
	if (restore.phase == ENDING)
		clean_up();
	else if (restore.phase == PACKING)
		pack_ended();
	else if (restore.phase == RELEASED &&
		 (exit_code(restore.child_status) == 0 || prepared_without_engine()))
		restore.dump ? dump_report_success() : report_success();
	else if (restore.phase == HELD || restore.phase == SAVING)
		restore_abort(restore.engine ? CODE_ENGINE : CODE_CRIU,
			      restore.engine ? "the container engine ended too early" :
					       "criu died while it held the tree");
	else
		/* In BUILDING even with status 0: the tree did not pass the hook. */
		report_failure();
}
