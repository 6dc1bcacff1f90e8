/* Lab builds only: dispatch of lab messages. A session has at most one job. */
#ifdef OVR_LAB
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "lab.h"

struct job jobs[MAX_SESSIONS];

/* Bytes sent to the host and not yet acknowledged, by session. */
static size_t under_way[MAX_SESSIONS];

bool lab_may_send(const struct session *session)
{
	return session_has_room(session) && under_way[session_index(session)] < WINDOW;
}

void lab_end_job(struct job *job)
{
	close_fd(&job->in);
	close_fd(&job->out);
	close_fd(&job->err);
	free(job->input);
	*job = (struct job){.in = -1, .out = -1, .err = -1};
}

void lab_session_ended(struct session *session)
{
	struct job *job = &jobs[session_index(session)];

	under_way[session_index(session)] = 0;
	if (job->what == NOTHING)
		return;
	if (job->what == RUN && !job->exited)
		kill(-job->pid, SIGKILL);
	lab_end_job(job);
}

void lab_refuse(struct session *session, const char *what)
{
	session_refuse(session, code_of_errno(errno), "%s: %s", what, strerror(errno));
}

void lab_send_data(struct session *session, enum op op, int stream, const uint8_t *data,
		   size_t size)
{
	struct writer writer = session_writer(session, op);

	if (op == OP_OUTPUT)
		message_add_uint(&writer, KEY_STREAM, (uint64_t)stream);
	message_add_bin(&writer, KEY_DATA, data, size);
	session_send(session, &writer);
	under_way[session_index(session)] += size + FRAME_COST;
}

static void add_credit(struct session *session, const struct message *message)
{
	size_t *size = &under_way[session_index(session)];
	uint64_t credit = message_uint(message, KEY_SIZE);

	*size = credit < *size ? *size - (size_t)credit : 0;
}

bool lab_message(struct session *session, const struct message *message)
{
	struct job *job = &jobs[session_index(session)];

	switch (message->op) {
	case OP_STDIN:
		lab_add_input(session, job, message);
		return true;
	case OP_DATA:
		lab_add_data(session, job, message);
		return true;
	case OP_CREDIT:
		add_credit(session, message);
		return true;
	case OP_RUN:
	case OP_PUT:
	case OP_GET:
	case OP_SPAWN:
		break;
	default:
		return false;
	}
	if (job->what != NOTHING)
		session_break(session, CODE_PROTOCOL, "the session already has a job");
	else if (message->op == OP_RUN)
		lab_run(session, job, message);
	else if (message->op == OP_PUT)
		lab_put(session, job, message);
	else if (message->op == OP_GET)
		lab_get(session, job, message);
	else
		lab_spawn(session, message);
	return true;
}

/* ------------------------------------------------------------------------ the loop */

void lab_work(void)
{
	for (size_t i = 0; i < MAX_SESSIONS; i++) {
		struct job *job = &jobs[i];

		if (job->what == GET)
			lab_send_file(job);
		else if (job->what == RUN)
			lab_run_work(job);
	}
}

void lab_watch(struct loop *loop)
{
	for (size_t i = 0; i < MAX_SESSIONS; i++) {
		struct job *job = &jobs[i];

		/* Output was flushed at once: continue without waiting for an event. */
		if ((job->what == GET || job->exited) && lab_may_send(job->session))
			loop_wake_at(loop, now_ms());
		if (job->what == RUN && !job->exited)
			lab_run_watch(loop, job);
	}
}
#endif
