/*
 * The pool: shared declarations.
 *
 *   warm.c	creation and end
 *   warm_use.c	restores that use it
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
	struct session *waiting; /* the session whose Warm is not answered yet */
	char note[160];          /* why there is no pool */
};

extern struct warm_pool pool;

void pool_unmap(struct pool_state **state);
/* Forget the pool, without waiting for its process. */
void pool_forget(void);
void pool_end(const char *why);

#endif
