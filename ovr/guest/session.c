/* Sessions: hello, authentication, dispatch of messages, errors, end. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "move.h"
#include "session.h"

#define LINGER_MS 1000

struct session sessions[MAX_SESSIONS];

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
			.used = true,
			.fd = fd,
			.link = link,
			.state = link == LINK_STREAM ? STATE_FRAMES : STATE_LOST,
			.in = malloc(IN_SIZE),
			.out = malloc(OUT_SIZE),
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

void session_forget(struct session *session)
{
	restore_session_ended(session);
	lab_session_ended(session);
	session->greeted = session->proved = false;
	warm_session_ended(session);
	find_session_ended(session);
	session->in_size = session->out_start = session->out_size = 0;
	if (session->link != LINK_STREAM)
		session->state = STATE_LOST;
}

void session_close(struct session *session)
{
	session_forget(session);
	close(session->fd);
	free(session->in);
	free(session->out);
	session->used = false;
	if (session->link == LINK_PORT)
		transport_port_lost();
}

/* ------------------------------------------------------------------------ errors */

static void send_error(struct session *session, enum code code, const char *format, va_list args)
{
	struct writer writer = session_writer(session, OP_ERROR);
	char text[512];

	vsnprintf(text, sizeof(text), format, args);
	for (char *c = text; *c; c++)
		if (*c < ' ' || *c > '~')
			*c = '?';
	message_add_str(&writer, KEY_CODE, code_name(code));
	message_add_str(&writer, KEY_TEXT, text);
	session_send(session, &writer);
}

void session_refuse(struct session *session, enum code code, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	send_error(session, code, format, args);
	va_end(args);
}

void session_break(struct session *session, enum code code, const char *format, ...)
{
	va_list args;

	restore_session_ended(session);
	lab_session_ended(session);
	warm_session_ended(session);
	find_session_ended(session);
	va_start(args, format);
	send_error(session, code, format, args);
	va_end(args);
	session->greeted = session->proved = false;
	session->in_size = 0;
	/* A stream lingers, so that no reset discards the error. */
	session->state = session->link == LINK_STREAM ? STATE_LINGER : STATE_LOST;
	session->linger_until = now_ms() + LINGER_MS;
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
		/* Pending output belongs to an earlier session. */
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
	message_add_bin(&writer, KEY_NONCE, session->nonces.agent, NONCE_SIZE);
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
	message_add_uint(&writer, KEY_WARM_AT, warm_address());
	session_send(session, &writer);
}

static void hello(struct session *session, const struct message *message)
{
	const struct mp_value *token = &message->field[KEY_TOKEN];

	if (session->greeted || token->size != TOKEN_SIZE) {
		session_break(session, CODE_PROTOCOL, "protocol error: invalid hello");
	} else if (message_uint(message, KEY_VERSION) != PROTOCOL_VERSION) {
		session_break(session, CODE_VERSION,
			      "the agent speaks version %d of the protocol, not %llu",
			      PROTOCOL_VERSION,
			      (unsigned long long)message_uint(message, KEY_VERSION));
	} else if (!proof_make_nonce(session->nonces.agent)) {
		session_break(session, code_of_errno(errno), "cannot get random numbers: %s",
			      strerror(errno));
	} else {
		session->greeted = true;
		memcpy(session->nonces.host, token->data, TOKEN_SIZE);
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
	uint8_t proof[SHA256_SIZE];
	struct writer writer;

	if (!proof_of_host(&session->nonces, &message->field[KEY_PROOF])) {
		session_break(session, CODE_PROOF,
			      "authentication failed: the host does not know the secret in"
			      " this VM's memory");
		return;
	}
	session->proved = true;
	proof_of_agent(&session->nonces, proof);
	writer = session_writer(session, OP_PROVED);
	message_add_bin(&writer, KEY_PROOF, proof, sizeof(proof));
	session_send(session, &writer);
}

static bool is_about_a_move(enum op op)
{
	return op == OP_PREPARE || op == OP_ARCHIVE || op == OP_ADOPT || op == OP_DOUBTS ||
	       op == OP_MOVED;
}

static bool needs_proof(enum op op)
{
	switch (op) {
	case OP_WARM:
	case OP_CONFIG:
	case OP_FILES:
	case OP_BEGIN:
	case OP_FIND:
	case OP_FREEZE:
	case OP_TRACK:
	case OP_DUMP:
	case OP_FETCH:
	case OP_TOUCH:
	case OP_MAP:
	case OP_GO:
	case OP_ABORT:
		return true;
	default:
		return is_about_a_move(op);
	}
}

static void proven_message(struct session *session, const struct message *message)
{
	if (!session->proved)
		session_break(session, CODE_UNPROVEN, "the session is not authenticated");
	else if (message->op == OP_WARM)
		warm_message(session, message);
	else if (message->op == OP_FIND)
		find_message(session, message);
	else if (message->op == OP_CONFIG)
		config_message(session);
	else if (is_about_a_move(message->op))
		move_message(session, message);
	else
		restore_message(session, message);
}

void session_dispatch(struct session *session, const uint8_t *body, size_t size)
{
	struct message message;
	const char *error = message_parse(&message, body, size);

	if (error) {
		session_break(session, CODE_PROTOCOL, "protocol error: %s", error);
		return;
	}
	if (!session->greeted && message.op != OP_HELLO) {
		session_break(session, CODE_PROTOCOL, "protocol error: no hello");
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
	default:
		if (needs_proof(message.op))
			proven_message(session, &message);
		else if (!lab_message(session, &message))
			session_break(session, CODE_PROTOCOL,
				      "message not supported by this agent");
	}
}
