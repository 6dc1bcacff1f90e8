/*
 * A host that sends anything, in any pieces, over each kind of link, and reads
 * or does not read. The loop's turns are made here, and time is ours. What
 * comes back are whole frames of the protocol; in the end the session is gone.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "fuzz.h"

#include "../../../ovr/guest/session.c"
#include "../../../ovr/guest/session_io.c"
#include "../../../ovr/guest/config.c"

#define MAX_TURNS 64

static int64_t now;
static int waiter = -1, host = -1;
static bool port_lost, hung_up;
static size_t heard, ended;

/* ------------------------------------------------------------------------ the rest of the agent */

int64_t now_ms(void) { return now; }
void restore_session_ended(struct session *session) { (void)session, ended++; }
void restore_session_heard(struct session *session) { (void)session, heard++; }
void transport_port_lost(void) { port_lost = true; }
int transport_port_waiter(void) { return waiter; }
bool transport_port_connected(int fd) { return fd >= 0; }
bool populate_can_force(void) { return true; }
const char *criu_version(void) { return "4.1"; }
uint64_t warm_size(void) { return 1 << 20; }
uint64_t warm_address(void) { return 1ull << 46; }
void warm_session_ended(struct session *session) { (void)session; }
void find_session_ended(struct session *session) { (void)session; }
void engine_add_installed(struct writer *writer)
{
	message_add_list(writer, KEY_ENGINES, 1);
	message_item_str(writer, "podman");
}

void find_message(struct session *session, const struct message *message)
{
	char text[MAX_STRING];

	use_message(message);
	message_str(message, KEY_ENGINE, text);
	message_str(message, KEY_NAME, text);
	session_refuse(session, CODE_ENGINE, "no container");
}

void warm_message(struct session *session, const struct message *message)
{
	use_message(message);
	session_refuse(session, CODE_POOL, "no pool");
}

uint64_t proof_address(void) { return 0x7f0000000000; }

bool proof_make_nonce(uint8_t nonce[NONCE_SIZE])
{
	memset(nonce, 7, NONCE_SIZE);
	return true;
}

bool proof_of_host(const struct nonces *nonces, const struct mp_value *proof)
{
	CHECK(nonces->agent[0] == 7);
	return proof->size == 1;
}

void proof_of_agent(const struct nonces *nonces, uint8_t proof[SHA256_SIZE])
{
	CHECK(nonces->agent[0] == 7);
	memset(proof, 9, SHA256_SIZE);
}

void loop_wake_at(struct loop *loop, int64_t deadline)
{
	if (loop->deadline < 0 || deadline < loop->deadline)
		loop->deadline = deadline;
}

void loop_watch(struct loop *loop, int fd, short events, callback call, void *context)
{
	CHECK(loop->count < (int)ARRAY_SIZE(loop->fds));
	loop->fds[loop->count] = (struct pollfd){.fd = fd, .events = events};
	loop->calls[loop->count] = call;
	loop->contexts[loop->count++] = context;
}

/* As a restore answers: not at all, with news, a refusal, or the end of the session. */
void restore_message(struct session *session, const struct message *message)
{
	struct writer writer;

	use_message(message);
	switch (message->op) {
	case OP_BEGIN: session_refuse(session, CODE_START, "no \x7f criu %d", 1); break;
	case OP_TOUCH:
		if (session_has_room(session)) {
			writer = session_writer(session, OP_TOUCHED);
			session_send(session, &writer);
		}
		break;
	case OP_ABORT: session_break(session, CODE_HOST, "%s", "aborted"); break;
	default: break;
	}
}

void move_message(struct session *session, const struct message *message)
{
	char text[MAX_STRING];

	use_message(message);
	if (message->op != OP_DOUBTS && message->op != OP_ARCHIVE)
		message_str(message, KEY_MOVE, text);
	session_refuse(session, CODE_DOUBT, "no move");
}

/* ------------------------------------------------------------------------ the host */

/* Parse the agent's output on a stream by the protocol. */
static struct {
	uint8_t data[8 * MAX_FRAME];
	size_t size;
} received;

static void check_frames(void)
{
	struct message message;
	size_t at = 0, size;

	while (received.size - at >= 4) {
		size = get_be32(received.data + at);
		CHECK(size && size <= MAX_FRAME);
		if (received.size - at - 4 < size)
			break;
		CHECK(!message_parse(&message, received.data + at + 4, size));
		use_message(&message);
		at += 4 + size;
	}
	received.size -= at;
	memmove(received.data, received.data + at, received.size);
}

static void drain(bool stream)
{
	ssize_t size;

	while ((size = read(host, received.data + received.size,
			    sizeof(received.data) - received.size)) > 0) {
		received.size += (size_t)size;
		if (stream)
			check_frames();
		else
			received.size = 0;
	}
}

static void turn(void)
{
	static struct loop loop;
	bool in_bounds;

	session_work();
	loop.count = 0;
	loop.deadline = -1;
	session_watch(&loop);
	now++;
	if (poll(loop.fds, (nfds_t)loop.count, 0) > 0)
		for (int i = 0; i < loop.count; i++)
			if (loop.fds[i].revents)
				loop.calls[i](loop.fds[i].fd, loop.fds[i].revents,
					      loop.contexts[i]);
	for (int i = 0; i < MAX_SESSIONS; i++) {
		in_bounds = sessions[i].in_size <= IN_SIZE &&
			    sessions[i].out_start + sessions[i].out_size <= OUT_SIZE;
		CHECK(!sessions[i].used || in_bounds);
	}
}

static void transmit(const uint8_t *data, size_t size)
{
	for (int i = 0; size && i < MAX_TURNS && sessions[0].used; i++) {
		ssize_t done = send(host, data, size, MSG_NOSIGNAL);

		if (done > 0) {
			data += done;
			size -= (size_t)done;
		}
		turn();
	}
}

static void transmit_frame(const uint8_t *body, size_t size)
{
	uint8_t head[4];

	put_be32(head, (uint32_t)size);
	transmit(head, sizeof(head));
	transmit(body, size);
}

static void greet(uint8_t token)
{
	uint8_t frame[256], bytes[TOKEN_SIZE];
	struct writer writer;

	memset(bytes, token, sizeof(bytes));
	message_open(&writer, frame, sizeof(frame), OP_HELLO);
	message_add_uint(&writer, KEY_VERSION, PROTOCOL_VERSION);
	message_add_bin(&writer, KEY_TOKEN, bytes, sizeof(bytes));
	transmit(frame, message_close(&writer));
	if (token & 8)
		return;
	message_open(&writer, frame, sizeof(frame), OP_PROVE);
	message_add_bin(&writer, KEY_PROOF, &token, 1);
	transmit(frame, message_close(&writer));
}

static void step(struct input *input, bool stream)
{
	static const uint8_t zeros[SYNC_ZEROS + 255];
	const uint8_t *data;
	uint8_t what = input_byte(input);
	size_t size = 0;

	if ((what & 7) < 2)
		size = input_bytes(input, &data, input_number(input, 2) % (2 * MAX_FRAME));
	switch (what & 7) {
	case 0: transmit(data, size); break;
	case 1: transmit_frame(data, size); break;
	case 2: transmit(zeros, SYNC_ZEROS - 128 + (size_t)input_byte(input)); break;
	case 3: transmit((const uint8_t *)MAGIC, MAGIC_SIZE); break;
	case 4: greet(what); break;
	case 5: drain(stream); break;
	case 6:
		now += 100 * (int64_t)input_byte(input);
		turn();
		break;
	default:
		hung_up = true;
		shutdown(host, what & 8 ? SHUT_WR : SHUT_RD);
		turn();
		break;
	}
}

/* Whatever was said on a serial line before: who synchronises is heard, and answered at once. */
static void check_recovery(void)
{
	static const uint8_t zeros[64];
	uint8_t expected[MAGIC_SIZE + TOKEN_SIZE];

	for (size_t i = 0; i < SYNC_ZEROS; i += sizeof(zeros)) {
		drain(false);
		transmit(zeros, sizeof(zeros));
	}
	transmit((const uint8_t *)MAGIC, MAGIC_SIZE);
	for (int i = 0; i < MAX_TURNS; i++) {
		drain(false);
		turn();
	}
	greet(0x5a);
	turn();
	received.size = (size_t)read(host, received.data, sizeof(received.data));
	memcpy(expected, MAGIC, MAGIC_SIZE);
	memset(expected + MAGIC_SIZE, 0x5a, TOKEN_SIZE);
	CHECK(received.size < sizeof(received.data) && received.size > sizeof(expected));
	CHECK(!memcmp(received.data, expected, sizeof(expected)));
	received.size -= sizeof(expected);
	memmove(received.data, received.data + sizeof(expected), received.size);
	check_frames();
	CHECK(!received.size);
}

/* A descriptor that cannot be read, in the place of the link. */
static void break_link(int fd)
{
	int directory = open("/", O_RDONLY | O_DIRECTORY);

	CHECK(directory >= 0 && dup2(directory, fd) == fd);
	close(directory);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, data + size};
	enum link link = input_byte(&input) % 3;
	int pair[2];

	if (waiter < 0) {
		waiter = eventfd(1, 0);   /* readable for ever */
		signal(SIGPIPE, SIG_IGN); /* as the loop has it */
	}
	received.size = 0;
	port_lost = hung_up = false;
	CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair));
	host = pair[0];
	CHECK(session_start(pair[1], link));
	while (input_left(&input) && sessions[0].used)
		step(&input, link == LINK_STREAM);
	drain(link == LINK_STREAM);
	if (link != LINK_STREAM && !hung_up)
		check_recovery();
	if (link == LINK_PORT && sessions[0].used)
		break_link(pair[1]);
	close(host);
	for (int i = 0; i < MAX_TURNS && sessions[0].used; i++) {
		now += LINGER_MS;
		turn();
	}
	CHECK(!sessions[0].used && port_lost == (link == LINK_PORT));
	return 0;
}
