/*
 * The commit of a move.
 *
 *   prepare.c		the tree in its source: prepared, in doubt, decided
 *   container.c		if it is a container's: its archive, its removal
 *   freeze.c		the cgroups that hold it (freeze.h)
 *   freeze_list.c	all such cgroups in this guest
 *   moved.c		the trees that have run in this guest, their destination
 */
#ifndef OVR_MOVE_H
#define OVR_MOVE_H

#include "agent.h"

/* prepare.c */
/* Handle Prepare, Archive, Adopt, Doubts and Moved. */
void move_message(struct session *session, const struct message *message);
/* The id of a move in a message. False if it is none, which ends the session. */
bool move_id(struct session *session, const struct message *message, char id[MOVE_ID + 1]);
/* A hook of CRIU's reports again, after the first one was killed. */
bool move_hook(pid_t root, pid_t criu);
/* The session of a prepared move has ended: it is in doubt. */
void move_session_ended(void);
/* Abort: put the tree back. */
void move_undo(void);
/* Go: the tree is to die. `told`: CRIU was told so. */
void move_go(bool told);
/* Whether there is nothing else to do: CRIU has ended, but the tree has not died. */
bool move_work(void);
void move_watch(struct loop *loop);

/* container.c */
/* Handle Archive. */
void container_pack(struct session *session);
/* CRIU and podman have ended: the tree is prepared, as before. */
void container_packed(void);
/* Handle Go for a container. */
void container_go(struct session *session);
/* REMOVING: whether podman has done it; else the phase may be PREPARED again. */
bool container_is_removed(void);

/* To CRIU's hook, not yet the answer: if the agent dies, wait for the decision of another one. */
#define HOOK_PREPARED 'p'

/* images.c */
/* A descriptor of the directory of moved.c, or -1 and errno. */
int directory_open_moves(void);

/* moved.c */
/* Record that a tree is about to run. False and errno on failure. */
bool moved_mark(const char *move);
void moved_unmark(const char *move);
bool moved_is_marked(const char *move);

#endif
