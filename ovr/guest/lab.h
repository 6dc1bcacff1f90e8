/*
 * Lab builds only: shared declarations.
 *
 *   lab.c		dispatch of messages, one job a session at a time, poll loop
 *   lab_run.c		programs: their input, output and exit
 *   lab_files.c	files sent to and from the guest
 */
#ifndef OVR_LAB_H
#define OVR_LAB_H

#include "agent.h"

enum what { NOTHING, RUN, PUT, GET };

struct job {
	enum what what;
	struct session *session;
	pid_t pid;
	bool exited, timed_out;
	int status;
	int64_t deadline;
	int in, out, err; /* RUN: pipes; PUT, GET: `in` or `out` is the file */
	uint8_t *input;   /* standard input that is not written yet */
	size_t input_at, input_size;
	uint64_t size;
};

/* lab.c */
extern struct job jobs[MAX_SESSIONS];
bool lab_may_send(const struct session *session);
void lab_send_data(struct session *session, enum op op, int stream, const uint8_t *data,
		   size_t size);
/* Answer with an error that includes strerror(errno). */
void lab_refuse(struct session *session, const char *what);
void lab_end_job(struct job *job);

/* lab_run.c */
void lab_run(struct session *session, struct job *job, const struct message *message);
void lab_spawn(struct session *session, const struct message *message);
void lab_add_input(struct session *session, struct job *job, const struct message *message);
void lab_run_watch(struct loop *loop, struct job *job);
/* Handle the job's exit or timeout. */
void lab_run_work(struct job *job);

/* lab_files.c */
void lab_put(struct session *session, struct job *job, const struct message *message);
void lab_add_data(struct session *session, struct job *job, const struct message *message);
void lab_get(struct session *session, struct job *job, const struct message *message);
void lab_send_file(struct job *job);

#endif
