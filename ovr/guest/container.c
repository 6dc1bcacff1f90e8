/*
 * The source of a container's move: its archive, and its end by podman.
 *
 * podman writes the archive only when its CRIU has ended, and the destination needs it before the
 * decision. So CRIU lets the prepared tree go before that, and the cgroups alone hold it, frozen.
 * After Go only podman may end it: it would take any other end for one of the container's own, and
 * start it again if it is told to restart it.
 */
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "freeze.h"
#include "move.h"
#include "restore.h"

#define REMOVAL_MS 60000

/* ------------------------------------------------------------------------ archive */

void container_pack(struct session *session)
{
	if (!restore_in_phase(session, PREPARED))
		return;
	if (!restore.container || restore.packed)
		session_break(session, CODE_PROTOCOL, "message out of order");
	else
		restore_pack();
}

void container_packed(void)
{
	restore.phase = PREPARED;
	restore.packed = true;
	close_fd(&restore.hook);
	close_fd(&restore.listener);
	/* Before the decision, which the agent may not live to see. */
	engine_remove_images(&restore.directory);
	if (restore.owner)
		dump_report_stats(restore.owner);
}

/* ------------------------------------------------------------------------ removal */

static int messages = -1; /* podman's, a memfd */

void container_go(struct session *session)
{
	pid_t child;

	/* CRIU would let the tree go. */
	if (!restore.packed) {
		session_break(session, CODE_PROTOCOL, "message out of order");
		return;
	}
	populate_end();
	restore.decided = true;
	messages = memfd_create("messages", MFD_CLOEXEC);
	child = messages < 0 ? -1 : engine_start_removal(freeze_container(), messages);
	if (child < 0) {
		session_refuse(session, CODE_ENGINE, "podman cannot be started: %s",
			       strerror(errno));
		close_fd(&messages);
		return;
	}
	restore.phase = REMOVING;
	restore.child = child;
	restore.child_ended = false;
	restore.late_at =
		now_ms() + (restore.stall_ms < REMOVAL_MS ? restore.stall_ms : REMOVAL_MS);
}

/* The move is still prepared, and Go can be repeated. */
static void report_refusal(void)
{
	char lines[LOG_LINES][LOG_WIDTH];
	int count = log_collect(messages, "", lines, 0);
	const char *last = restore.late_at == LLONG_MAX ? "it does not end" : "no message";

	if (count)
		last = lines[count - 1];
	complain("move %s: podman has not removed the container: %s", restore.move, last);
	restore.phase = PREPARED;
	if (restore.owner)
		session_refuse(restore.owner, CODE_ENGINE,
			       "podman has not removed the container: %s", last);
}

bool container_is_removed(void)
{
	if (!restore.child_ended) {
		if (now_ms() >= restore.late_at) {
			kill(restore.child, SIGKILL);
			restore.late_at = LLONG_MAX;
		}
		return false;
	}
	if (restore.child_status == 0)
		restore.phase = RELEASED;
	else
		report_refusal();
	close_fd(&messages);
	return restore.phase == RELEASED;
}
