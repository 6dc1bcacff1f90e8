/* The link to the hosts of a restore or dump: what the agent sends is checked. */

static uint8_t answer[MAX_FRAME + 4];

bool session_has_input(const struct session *session)
{
	(void)session;
	return false;
}

bool session_has_room(const struct session *session)
{
	CHECK(session == &hosts[0] || session == &hosts[1]);
	return room > 0;
}

struct writer session_writer(struct session *session, enum op op)
{
	struct writer writer;

	CHECK(session == &hosts[0] || session == &hosts[1]);
	message_open(&writer, answer, sizeof(answer), op);
	return writer;
}

static void check_dump(const struct message *message)
{
	char name[MAX_STRING];

	switch (message->op) {
	case OP_SAVED:
		message_str(message, KEY_NAME, name);
		CHECK(criu_lives && dump.hooks && strcmp(name, "parent"));
		break;
	case OP_STOPPED: CHECK(criu_lives && dump.hooks && traced); break;
	case OP_DUMPED:
		CHECK(!criu_lives && !engine_lives && !remover_lives);
		if (restore.phase == PREPARED)
			CHECK(said_archive && !said_go && prepared.on && dump.succeeded);
		else
			CHECK(said_go && (prepared.emptied || (dump.succeeded && !prepared.on)));
		break;
	case OP_FAILED:
	case OP_ABORTED:
		if (message_uint(message, KEY_UNDONE))
			CHECK((!criu_lives || !known_criu()) && !dump.tree_ended && !prepared.on &&
			      (dump.hooks || !dump.killed || !dump.may_stop || !known_criu()));
		break;
	default: break;
	}
}

void session_send(struct session *session, struct writer *writer)
{
	size_t size = message_close(writer);
	struct message message;

	CHECK(size && !message_parse(&message, answer + 4, size - 4));
	use_message(&message);
	session->answers++;
	room--;
	if (message.op == OP_PREPARED) {
		CHECK(restore.phase == PREPARED && restore.owner == session);
		prepared.answered = true;
	}
	if (message.op == OP_RESTORED)
		CHECK(said_go && tree_runs);
	if (message.op == OP_FAILED || message.op == OP_ABORTED)
		CHECK(!tree_lives && message_has(&message, KEY_UNDONE));
	if (dump.on)
		check_dump(&message);
}

void session_refuse(struct session *session, enum code code, const char *format, ...)
{
	(void)code, (void)format;
	session->answers++;
}

void session_break(struct session *session, enum code code, const char *format, ...)
{
	(void)code, (void)format;
	restore_session_ended(session);
	session->answers++;
}
