/* Sessions: framing, the serial line's synchronisation, dispatch. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "agent.h"

#define IN_SIZE (4 + MAX_FRAME)
#define OUT_SIZE (4 * MAX_FRAME)
#define LINGER_MS 1000
/* No sequence of frames holds so many zeros in a row: a payload's, and a length's high bytes. */
#define SYNC_MIN (MAX_FRAME + 8)

/*
 * Most bytes a write. Since "vsock/virtio: Allocate nonlinear SKBs for handling large transmit
 * buffers" (6693731487a8) larger packets leave the guest in more than one piece, and
 * vhost-device-vsock (0.3) drops a packet with more than one piece of data.
 */
#define WRITE_SIZE (16 << 10)

enum state {
	STATE_FRAMES,
	STATE_LOST,	/* serial: nothing counts until the next sync */
	STATE_MAGIC,	/* serial: the zeros were seen */
	STATE_LINGER,	/* stream: an error is on its way out, input is discarded */
};

struct session {
	bool used;
	int fd;
	enum link link;
	enum state state;
	bool greeted, proved;
	bool ended;		/* to be closed at the loop's next turn */
	bool unplugged;		/* port: the host is not connected */
	int64_t linger_until;
	unsigned zeros, matched;
	size_t in_size, out_start, out_size;
	uint8_t *in, *out;
};

static struct session sessions[MAX_SESSIONS];

int session_index(const struct session *session)
{
	return (int)(session - sessions);
}

bool session_start(int fd, enum link link)
{
	for (int i = 0; i < MAX_SESSIONS; i++) {
		struct session *session = &sessions[i];

		if (session->used)
			continue;
		*session = (struct session){
			.used = true, .fd = fd, .link = link,
			.state = link == LINK_STREAM ? STATE_FRAMES : STATE_LOST,
			.in = malloc(IN_SIZE), .out = malloc(OUT_SIZE),
		};
		if (session->in && session->out)
			return true;
		free(session->in);
		free(session->out);
		session->used = false;
		break;
	}
	return false;
}

/* The host that spoke so far is no more. */
static void session_forget(struct session *session)
{
	restore_session_ended(session);
	lab_session_ended(session);
	session->greeted = session->proved = false;
	warm_session_ended(session);
	session->in_size = session->out_start = session->out_size = 0;
	if (session->link != LINK_STREAM)
		session->state = STATE_LOST;
}

static void session_close(struct session *session)
{
	session_forget(session);
	close(session->fd);
	free(session->in);
	free(session->out);
	session->used = false;
	if (session->link == LINK_PORT)
		transport_port_lost();
}

/* ------------------------------------------------------------------------ output */

bool session_has_room(const struct session *session)
{
	return session->out_size < MAX_FRAME && session->state == STATE_FRAMES && !session->ended;
}

/* Requests wait while their answers might not fit; two frames more stay free for news. */
static bool can_answer(const struct session *session)
{
	return session->out_size <= OUT_SIZE - 3 * (4 + MAX_FRAME);
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

static void send_error(struct session *session, const char *format, va_list args)
{
	struct writer writer = session_writer(session, OP_ERROR);
	char text[512];

	vsnprintf(text, sizeof(text), format, args);
	for (char *c = text; *c; c++)
		if (*c < ' ' || *c > '~')
			*c = '?';
	message_add_str(&writer, KEY_TEXT, text);
	session_send(session, &writer);
}

void session_refuse(struct session *session, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	send_error(session, format, args);
	va_end(args);
}

void session_break(struct session *session, const char *format, ...)
{
	va_list args;

	restore_session_ended(session);
	lab_session_ended(session);
	warm_session_ended(session);
	va_start(args, format);
	send_error(session, format, args);
	va_end(args);
	session->greeted = session->proved = false;
	session->in_size = 0;
	/* A stream lingers, so that the error is not overtaken by a reset. */
	session->state = session->link == LINK_STREAM ? STATE_LINGER : STATE_LOST;
	session->linger_until = now_ms() + LINGER_MS;
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

/* ------------------------------------------------------------------------ messages */

static void boot_id(char text[64])
{
	FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");

	if (!file || !fgets(text, 64, file))
		text[0] = 0;
	text[strcspn(text, "\n")] = 0;
	if (file)
		fclose(file);
}

static void welcome(struct session *session, const struct mp_value *token)
{
	struct utsname name;
	struct writer writer;
	char boot[64];

	if (session->link != LINK_STREAM) {
		/* Everything that was on its way out belongs to somebody else. */
		session->out_start = 0;
		session->out_size = MAGIC_SIZE + TOKEN_SIZE;
		memcpy(session->out, MAGIC, MAGIC_SIZE);
		memcpy(session->out + MAGIC_SIZE, token->data, TOKEN_SIZE);
	}
	uname(&name);
	boot_id(boot);
	writer = session_writer(session, OP_WELCOME);
	message_add_uint(&writer, KEY_VERSION, PROTOCOL_VERSION);
	message_add_bin(&writer, KEY_TOKEN, token->data, TOKEN_SIZE);
	message_add_str(&writer, KEY_AGENT, AGENT_VERSION);
	message_add_bool(&writer, KEY_LAB_BUILD, LAB_BUILD);
	message_add_str(&writer, KEY_KERNEL, name.release);
	if (criu_version())
		message_add_str(&writer, KEY_CRIU, criu_version());
	message_add_uint(&writer, KEY_PID, (uint64_t)getpid());
	message_add_uint(&writer, KEY_PAGE_SIZE, (uint64_t)sysconf(_SC_PAGESIZE));
	message_add_str(&writer, KEY_BOOT_ID, boot);
	message_add_bool(&writer, KEY_FORCE_WRITE, populate_can_force());
	message_add_uint(&writer, KEY_SECRET_AT, proof_address());
	engine_add_installed(&writer);
	message_add_uint(&writer, KEY_WARM, warm_size());
	session_send(session, &writer);
}

static void hello(struct session *session, const struct message *message)
{
	const struct mp_value *token = &message->field[KEY_TOKEN];

	if (session->greeted || token->size != TOKEN_SIZE)
		session_break(session, "broke the protocol: a bad hello");
	else if (message_uint(message, KEY_VERSION) != PROTOCOL_VERSION)
		session_break(session, "the agent speaks version %d of the protocol, not %llu",
			      PROTOCOL_VERSION,
			      (unsigned long long)message_uint(message, KEY_VERSION));
	else {
		session->greeted = true;
		welcome(session, token);
	}
}

static void pong(struct session *session, const struct message *message)
{
	struct writer writer = session_writer(session, OP_PONG);

	message_add_uint(&writer, KEY_NUMBER, message_uint(message, KEY_NUMBER));
	session_send(session, &writer);
}

static void prove(struct session *session, const struct message *message)
{
	if (!proof_right(&message->field[KEY_SECRET]))
		session_break(session, "this is not what lies in the memory of this VM");
	else
		session->proved = true;
}

static void dispatch(struct session *session, const uint8_t *body, size_t size)
{
	struct message message;
	const char *error = message_parse(&message, body, size);

	if (error) {
		session_break(session, "broke the protocol: %s", error);
		return;
	}
	if (!session->greeted && message.op != OP_HELLO) {
		session_break(session, "broke the protocol: no hello");
		return;
	}
	restore_session_heard(session);
	switch (message.op) {
	case OP_HELLO:
		hello(session, &message);
		break;
	case OP_PING:
		pong(session, &message);
		break;
	case OP_ALIVE:
		break;
	case OP_PROVE:
		prove(session, &message);
		break;
	case OP_POOL:
		warm_message(session, &message);
		break;
	case OP_WARM:
	case OP_FILES: case OP_BEGIN: case OP_TOUCH: case OP_MAP: case OP_GO: case OP_ABORT:
		if (session->proved && message.op == OP_WARM)
			warm_message(session, &message);
		else if (session->proved)
			restore_message(session, &message);
		else
			session_break(session, "prove first that you can read this VM's memory");
		break;
	default:
		if (!lab_message(session, &message))
			session_break(session, "this agent does not do that");
	}
}

/* ------------------------------------------------------------------------ input */

/* The frame at `at`, with its head: 0 when there is not yet a whole one. */
static size_t frame_at(const struct session *session, size_t at)
{
	size_t left = session->in_size - at, size;

	if (left < 4)
		return 0;
	size = get_be32(session->in + at);
	/* One that cannot be is whole already. */
	return !size || size > MAX_FRAME ? 4 : left - 4 < size ? 0 : 4 + size;
}

static void process_frames(struct session *session)
{
	size_t at = 0, size;

	while (session->state == STATE_FRAMES && !session->ended && can_answer(session)) {
		size = frame_at(session, at);
		if (!size)
			break;
		if (size == 4) {
			session_break(session, "broke the protocol: a frame of %u bytes",
				      get_be32(session->in + at));
			return;
		}
		dispatch(session, session->in + at + 4, size - 4);
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
	session->zeros = byte ? 0 : session->zeros < SYNC_MIN ? session->zeros + 1 : SYNC_MIN;
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
	session_forget(session);
	session->unplugged = true;
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

static void watch_one(struct loop *loop, struct session *session)
{
	short events;

	if (session->unplugged) {
		loop_watch(loop, transport_port_waiter(), POLLIN, on_port_news, session);
		return;
	}
	events = session->state == STATE_FRAMES && !can_answer(session) ? 0 : POLLIN;
	if (events && session->state == STATE_FRAMES && frame_at(session, 0)) {
		/* Since then there is room for its answer; and none to read any more. */
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
		/* What waited for room may go on now. */
		if (session->in_size && !session->ended)
			process_frames(session);
		flush(session);
		if (session->state == STATE_LINGER && now_ms() >= session->linger_until)
			session->ended = true;
		if (session->ended)
			session_close(session);
	}
}
