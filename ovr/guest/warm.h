/*
 * The pool: shared declarations.
 *
 *   warm.c	creation and end
 *   warm_use.c	restores that use it
 *   warm_prime.c	a first run of CRIU, meanwhile
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
	struct session *owner;   /* the session that it ends with, or NULL */
	char note[160];          /* why there is no pool */
};

extern struct warm_pool pool;

void pool_unmap(struct pool_state **state);
/* Forget the pool, without waiting for its process. */
void pool_forget(void);
void pool_end(const char *why);

void prime_begin(void);
bool prime_under_way(void);
bool prime_owns(pid_t pid);
bool prime_reaped(pid_t pid);
void prime_watch(struct loop *loop);

#endif
