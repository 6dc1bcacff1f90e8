/* The cgroups in which the tree of one prepared move is frozen. */
#ifndef OVR_FREEZE_H
#define OVR_FREEZE_H

#include "agent.h"

/* The name of such a cgroup: PREFIX ID, or PREFIX ID PODMAN. */
#define FREEZE_PREFIX "ovr-move-"
#define FREEZE_PODMAN ".podman" /* podman is to end the tree */

/*
 * Move the tasks that CRIU holds into new cgroups, which are frozen. Undone if there is a problem.
 * They must all be of podman's container of the id `container`; NULL: podman is not to end them.
 */
struct problem freeze_tree(const char *move, pid_t criu, const char *container);
/* Find the cgroups that an earlier agent has made; a problem if there are none. */
struct problem freeze_find(const char *move);
/* The id of the container that podman is to remove, to end the tree; empty: none. */
const char *freeze_container(void);
/* Whether freeze_tree() has moved a task. */
bool freeze_owns(pid_t task);
/* The tracer of a process in them, or 0. */
pid_t freeze_tracer(void);
/* Move all processes back, and remove the cgroups. False if some run where they are. */
bool freeze_undo(void);
/* Kill all processes; they may take a moment to die. */
void freeze_kill(void);
/* Remove the cgroups whose processes have died. True when none is left. */
bool freeze_emptied(void);
/* Leave the cgroups as they are. */
void freeze_forget(void);

/* freeze_list.c */
/*
 * Whether it is that of a move: the agent's own, frozen, with processes in it. A descriptor, or -1.
 * An empty one is removed. One that is not frozen could not be undone, and is decided.
 */
int freeze_open_found(int parent, const char *name);
/* Whether it is the name of one. */
bool freeze_is_name(const char *name);

/* The ids of the moves that have such cgroups. */
#define MAX_DOUBTS 64
struct moves {
	int count;
	bool too_many;
	char ids[MAX_DOUBTS][MOVE_ID + 1];
};
struct problem freeze_list(struct moves *moves);
void moves_add(struct moves *moves, const char *id);
void moves_remove(struct moves *moves, const char *id);

/* For the hook: its tree's cgroup, and whether that is still frozen. */
int freeze_open(pid_t root);
bool freeze_holds(int group);

#endif
