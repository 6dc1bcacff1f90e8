/*
 * Sessions: shared declarations.
 *
 *   session.c		messages, from hello to the end of a session
 *   session_io.c	input and output: buffers, frames, synchronization of serial lines
 */
#ifndef OVR_SESSION_H
#define OVR_SESSION_H

#include "agent.h"

#define IN_SIZE (4ul + MAX_FRAME)
#define OUT_SIZE (4ul * MAX_FRAME)

enum state {
	STATE_FRAMES,
	STATE_LOST,   /* serial: discard input until the next sync */
	STATE_MAGIC,  /* serial: zeros received, magic expected */
	STATE_LINGER, /* stream: discard input while an error is sent */
};

struct session {
	bool used;
	int fd;
	enum link link;
	enum state state;
	bool greeted, proved;
	struct nonces nonces;
	bool ended;        /* close it in the next turn of the loop */
	bool unplugged;    /* port: the host is not connected */
	int64_t forget_at; /* port: when to give up waiting for the host */
	int64_t linger_until;
	unsigned zeros, matched;
	size_t in_size, out_start, out_size;
	uint8_t *in, *out;
};

/* session.c */
extern struct session sessions[MAX_SESSIONS];
/* Forget the host of a serial session; the session waits for the next sync. */
void session_forget(struct session *session);
void session_close(struct session *session);
/* Parse and handle one frame. */
void session_dispatch(struct session *session, const uint8_t *body, size_t size);

#endif
