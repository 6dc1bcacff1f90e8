/*
 * One restore at a time: what the files that see to it share.
 *
 *   restore.c		the host's words, and deadlines
 *   restore_hook.c	CRIU's hook, and the tree that it holds
 *   restore_end.c	every end, and what the host hears of it
 *   progress.c		whether CRIU makes progress
 */
#ifndef OVR_RESTORE_H
#define OVR_RESTORE_H

#include "agent.h"

enum phase {
	IDLE,
	UPLOADING, /* image files come in */
	BUILDING,  /* CRIU runs, up to its hook */
	HELD,      /* the skeleton stands; CRIU is stopped */
	RELEASED,  /* the host said go; CRIU detaches and ends */
	ENDING,    /* the tree is killed; what its engine has made of it is its to remove */
};

struct restore {
	enum phase phase;
	struct session *owner; /* NULL once its session has ended */
	struct directory directory;
	int listener, hook;
	pid_t child; /* what we have started: CRIU, or an engine that starts it */
	pid_t criu, root;
	bool engine;
	struct engine_criu theirs; /* the engine's CRIU, from its first word on */
	bool child_ended, keep_log, warm, engine_killed;
	int child_status;
	int64_t silence_ms, silent_at, late_at; /* late_at: LLONG_MAX without a limit */
	int step; /* ENDING: of the removal of what an engine has left */
};

/* restore.c */
extern struct restore restore;
/* Back to IDLE; nothing of it is left but CRIU's tree, and the log if it is to be kept. */
void restore_forget(void);

/* restore_hook.c */
bool hook_listen(void);
void hook_watch(struct loop *loop);
/* CRIU and the tree that it holds are as everybody else. */
void hook_reset_priorities(void);
/* False when there is nobody to hear it. */
bool hook_say_go(void);

/* restore_end.c */
bool restore_criu_ended(void);
/* What belongs to it, as far as it is known. */
struct tree restore_tree(void);
/* Kill the tree and tell the host why. */
void restore_abort(enum code code, const char *reason);
/* What we have started has ended: CRIU, an engine, or what removes the rest of an engine's restore. */
void restore_child_ended(void);
void restore_engine_too_late(void);

/* progress.c */
/* Watch what was started; it is stalled when nothing changes in it for so long. */
void progress_begin(int64_t period_ms);
bool progress_stalled(void);
/* When to ask that again. */
int64_t progress_look_at(void);

#endif
