/*
 * Sessions: what the files that see to them share.
 *
 *   session.c		what a session says and understands, from its start to its end
 *   session_io.c	its bytes: buffers, frames, the serial line's synchronisation
 */
#ifndef OVR_SESSION_H
#define OVR_SESSION_H

#include "agent.h"

#define IN_SIZE (4ul + MAX_FRAME)
#define OUT_SIZE (4ul * MAX_FRAME)

enum state {
	STATE_FRAMES,
	STATE_LOST,   /* serial: nothing counts until the next sync */
	STATE_MAGIC,  /* serial: the zeros were seen */
	STATE_LINGER, /* stream: an error is on its way out, input is discarded */
};

struct session {
	bool used;
	int fd;
	enum link link;
	enum state state;
	bool greeted, proved;
	struct nonces nonces;
	bool ended;        /* to be closed at the loop's next turn */
	bool unplugged;    /* port: the host is not connected */
	int64_t forget_at; /* and then it is not awaited any longer */
	int64_t linger_until;
	unsigned zeros, matched;
	size_t in_size, out_start, out_size;
	uint8_t *in, *out;
};

/* session.c */
extern struct session sessions[MAX_SESSIONS];
/* The host that spoke so far is no more. */
void session_forget(struct session *session);
void session_close(struct session *session);
/* Do what a frame says. */
void session_dispatch(struct session *session, const uint8_t *body, size_t size);

#endif
