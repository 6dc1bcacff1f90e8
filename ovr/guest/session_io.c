/* Input and output of sessions: buffers, frames, synchronization of serial lines. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "session.h"

/* More zeros in a row than any sequence of frames has: a payload, and a length's high bytes. */
#define SYNC_MIN (MAX_FRAME + 8)

/* How long a port without a host keeps the session. */
#define UNPLUGGED_MS 2000

/*
 * Maximum bytes per write. Since "vsock/virtio: Allocate nonlinear SKBs for handling large transmit
 * buffers" (6693731487a8) larger packets leave the guest in more than one piece, and
 * vhost-device-vsock (0.3) drops packets with more than one piece of data.
 */
#define WRITE_SIZE (16 << 10)

/* ------------------------------------------------------------------------ output */

bool session_has_room(const struct session *session)
{
	return session->out_size < MAX_FRAME && session->state == STATE_FRAMES && !session->ended;
}

bool session_has_input(const struct session *session)
{
	struct pollfd waiting = {.fd = session->fd, .events = POLLIN};

	return poll(&waiting, 1, 0) > 0 && (waiting.revents & POLLIN);
}

/* Requests wait until their answers fit; two more frames stay free for unsolicited messages. */
static bool can_answer(const struct session *session)
{
	return session->out_size <= OUT_SIZE - 3 * (4ul + MAX_FRAME);
}

struct writer session_writer(struct session *session, enum op op)
{
	struct writer writer;

	if (session->out_start) {
		memmove(session->out, session->out + session->out_start, session->out_size);
		session->out_start = 0;
	}
	message_open(&writer, session->out + session->out_size, OUT_SIZE - session->out_size, op);
	return writer;
}

void session_send(struct session *session, struct writer *writer)
{
	size_t size = message_close(writer);

	session->out_size += size;
	if (!size)
		session->ended = true;
}

static void flush(struct session *session)
{
	while (session->out_size) {
		size_t size = session->out_size < WRITE_SIZE ? session->out_size : WRITE_SIZE;
		ssize_t done = write(session->fd, session->out + session->out_start, size);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0 && errno == EAGAIN)
			return;
		if (done <= 0) {
			session->ended = true;
			return;
		}
		session->out_start += (size_t)done;
		session->out_size -= (size_t)done;
	}
	session->out_start = 0;
}

/* ------------------------------------------------------------------------ input */

/* Size of the frame at `at`, including its head; 0 if it is incomplete. */
static size_t frame_at(const struct session *session, size_t at)
{
	size_t left = session->in_size - at, size;

	if (left < 4)
		return 0;
	size = get_be32(session->in + at);
	/* An invalid frame counts as complete. */
	if (!size || size > MAX_FRAME)
		return 4;
	return left - 4 < size ? 0 : 4 + size;
}

static void process_frames(struct session *session)
{
	size_t at = 0, size;

	while (session->state == STATE_FRAMES && !session->ended && can_answer(session)) {
		size = frame_at(session, at);
		if (!size)
			break;
		if (size == 4) {
			session_break(session, CODE_PROTOCOL, "protocol error: frame of %u bytes",
				      get_be32(session->in + at));
			return;
		}
		session_dispatch(session, session->in + at + 4, size - 4);
		at += size;
	}
	if (session->state != STATE_FRAMES)
		return;
	session->in_size -= at;
	memmove(session->in, session->in + at, session->in_size);
}

static void feed_serial_byte(struct session *session, uint8_t byte)
{
	if (byte && session->zeros >= SYNC_MIN) {
		session_forget(session);
		session->state = STATE_MAGIC;
		session->matched = 0;
	}
	if (byte)
		session->zeros = 0;
	else if (session->zeros < SYNC_MIN)
		session->zeros++;
	if (session->state == STATE_MAGIC) {
		if (byte != (uint8_t)MAGIC[session->matched])
			session->state = STATE_LOST;
		else if (++session->matched == MAGIC_SIZE)
			session->state = STATE_FRAMES;
	} else if (session->state == STATE_FRAMES) {
		session->in[session->in_size++] = byte;
	}
}

static ssize_t receive(struct session *session)
{
	static uint8_t piece[64 << 10];
	size_t room = IN_SIZE - session->in_size;
	ssize_t size;

	if (session->link == LINK_STREAM && session->state == STATE_FRAMES) {
		size = read(session->fd, session->in + session->in_size, room);
		if (size > 0)
			session->in_size += (size_t)size;
		return size;
	}
	size = read(session->fd, piece, room < sizeof(piece) ? room : sizeof(piece));
	if (session->link != LINK_STREAM)
		for (ssize_t i = 0; i < size; i++)
			feed_serial_byte(session, piece[i]);
	return size;
}

static void host_left(struct session *session)
{
	if (session->link != LINK_PORT) {
		session->ended = true;
		return;
	}
	/*
	 * Data of a port and its connection state arrive by different queues (in
	 * drivers/char/virtio_console.c, by a worker), so the host that left may
	 * be the predecessor of the one greeted already, and the news of the
	 * successor follows. A new host synchronizes in any case
	 * (feed_serial_byte). An authenticated session ends at once; if its host
	 * is still connected, it is sent the error.
	 */
	if (session->proved)
		session_break(session, CODE_LINK, "the link to the host broke");
	session->unplugged = true;
	session->forget_at = now_ms() + UNPLUGGED_MS;
}

/* Whether the session's host may still be connected. */
static bool awaited(const struct session *session)
{
	return session->unplugged && session->state != STATE_LOST;
}

static void on_input(struct session *session)
{
	ssize_t size = receive(session);

	if (size > 0)
		process_frames(session);
	else if (size == 0)
		host_left(session);
	else if (errno != EAGAIN && errno != EINTR)
		session->ended = true;
}

static void on_events(int fd, short events, void *context)
{
	struct session *session = context;

	(void)fd;
	if (session->ended)
		return;
	if (session->link == LINK_PORT && (events & POLLHUP)) {
		host_left(session);
		return;
	}
	if (events & POLLIN)
		on_input(session);
	else if (events & (POLLHUP | POLLERR | POLLNVAL))
		session->ended = true;
}

static void on_port_news(int fd, short events, void *context)
{
	struct session *session = context;

	(void)fd, (void)events;
	session->unplugged = !transport_port_connected(session->fd);
}

/* ------------------------------------------------------------------------ the loop */

static void watch_one(struct loop *loop, struct session *session)
{
	short events;

	if (session->unplugged) {
		loop_watch(loop, transport_port_waiter(), POLLIN, on_port_news, session);
		if (awaited(session))
			loop_wake_at(loop, session->forget_at);
		return;
	}
	events = session->state == STATE_FRAMES && !can_answer(session) ? 0 : POLLIN;
	if (events && session->state == STATE_FRAMES && frame_at(session, 0)) {
		/* There is room for the answer by now, and no room for more input. */
		loop_wake_at(loop, now_ms());
		events = 0;
	}
	if (session->out_size)
		events |= POLLOUT;
	loop_watch(loop, session->fd, events, on_events, session);
	if (session->state == STATE_LINGER)
		loop_wake_at(loop, session->linger_until);
}

void session_watch(struct loop *loop)
{
	for (int i = 0; i < MAX_SESSIONS; i++)
		if (sessions[i].used)
			watch_one(loop, &sessions[i]);
}

void session_work(void)
{
	for (int i = 0; i < MAX_SESSIONS; i++) {
		struct session *session = &sessions[i];

		if (!session->used)
			continue;
		if (awaited(session) && now_ms() >= session->forget_at)
			session_forget(session);
		/* Handle frames that waited for room. */
		if (session->in_size && !session->ended)
			process_frames(session);
		flush(session);
		if (session->state == STATE_LINGER && now_ms() >= session->linger_until)
			session->ended = true;
		if (session->ended)
			session_close(session);
	}
}
