/*
 * The pool: what the files that see to it share.
 *
 *   warm.c	making and ending it
 *   warm_use.c	a restore that takes it
 */
#ifndef OVR_WARM_H
#define OVR_WARM_H

#include "agent.h"
#include "warm/pool.h"

enum stage { NONE, FILLING, READY };

struct warm_pool {
	enum stage stage;
	pid_t pid;
	int socket;
	struct pool_state *state;
	struct session *waiting; /* who asked for it and has no answer yet */
	char note[160];          /* why the last one is no more */
};

extern struct warm_pool pool;

void pool_unmap(struct pool_state **state);
/* There is none any more, whatever becomes of its process. */
void pool_forget(void);
void pool_end(const char *why);

#endif
