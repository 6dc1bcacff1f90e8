/* The rest of the agent, as a restore sees it: a model of CRIU, its tree, and the host's link. */

int64_t now_ms(void) { return now; }
void sleep_ms(int ms) { now += ms; }
void complain(const char *format, ...) { (void)format; }

static void end_criu(int status)
{
	criu_lives = false;
	CHECK(restore_reaped(CRIU, status) == (restore.phase >= BUILDING));
}

void reap_children(void) {}

static int fuzz_kill(pid_t pid, int number)
{
	CHECK(pid == CRIU);
	if (number == SIGKILL && criu_lives)
		end_criu(SIGKILL);
	else if (number == SIGCONT)
		CHECK(said_go);
	return 0;
}

static int fuzz_prctl(int option, unsigned long value)
{
	CHECK(option == PR_SET_CHILD_SUBREAPER);
	subreaper = value;
	return 0;
}

struct problem directory_make(struct directory *directory)
{
	const char *temporary = getenv("TMPDIR");

	CHECK(!directory_there);
	*directory = (struct directory){.images = -1, .dump = -1};
	snprintf(directory->path, sizeof(directory->path), "%s", temporary ? temporary : "/tmp");
	directory_there = true;
	return (struct problem){.text = NULL};
}

struct problem directory_append(struct directory *directory, const struct mp_value *name,
				const struct mp_value *data)
{
	CHECK(directory_there);
	directory->bytes += name->size + data->size;
	return (struct problem){CODE_IMAGES, name->size ? NULL : "no name"};
}

void directory_remove(struct directory *directory, bool keep_log)
{
	char path[300];

	(void)keep_log;
	/* Whatever was built is dead, or the guest's. */
	CHECK(!tree_lives || tree_runs);
	if (directory->path[0]) {
		snprintf(path, sizeof(path), "%s/hook", directory->path);
		unlink(path);
	}
	directory_there = false;
	*directory = (struct directory){.images = -1, .dump = -1};
}

bool criu_command_make(struct criu_command *command, const struct directory *directory,
		       const struct message *begin)
{
	(void)command, (void)directory;
	errno = ENOENT;
	return message_uint(begin, KEY_LOG_LEVEL) != 7;
}

void criu_command_free(struct criu_command *command) { (void)command; }

pid_t criu_start(const struct criu_command *command)
{
	CHECK(directory_there && !criu_lives && subreaper);
	criu_lives = true;
	(void)command;
	return CRIU;
}

pid_t warm_take(const struct directory *directory, const struct message *begin,
		const struct criu_command *command)
{
	(void)directory, (void)begin, (void)command;
	return -1;
}

uint64_t warm_served(const char **why)
{
	*why = "";
	return 0;
}

void warm_forget(void) {}

/* A dump is not among what happens here. */
void dump_begin(struct session *session, const struct message *message)
{
	(void)message;
	session_break(session, CODE_PROTOCOL, "no dump here");
}
void dump_track(struct session *session, const struct message *message)
{
	dump_begin(session, message);
}
void dump_fetch(struct session *session, const struct message *message)
{
	dump_begin(session, message);
}
void dump_forget(void) {}
void dump_send_images(void) { abort(); }
void dump_report_success(void) { abort(); }

void priority_raise(pid_t pid) { (void)pid; }
void priority_reset(pid_t pid) { (void)pid; }
void priority_real_time(pid_t pid) { (void)pid; }
const char *exitkill_set(pid_t criu)
{
	CHECK(criu == CRIU);
	return NULL;
}
pid_t tree_parent(pid_t pid) { return pid == ROOT ? CRIU : 0; }

/* No engine is known here. */
bool engine_known(const char *name)
{
	(void)name;
	return false;
}
bool engine_criu_ended(const struct engine_criu *criu)
{
	(void)criu;
	return false;
}
void engine_forget(struct engine_criu *criu) { (void)criu; }

pid_t engine_start(const struct directory *directory, const struct message *begin)
{
	(void)directory, (void)begin;
	abort();
}

pid_t engine_clean_up(int step, const struct engine_criu *criu)
{
	(void)step, (void)criu;
	abort();
}

struct engine_criu engine_adopt(pid_t criu)
{
	(void)criu;
	abort();
}

void engine_result(const struct directory *directory, char line[LOG_WIDTH])
{
	(void)directory, (void)line;
	abort();
}

int engine_log_errors(const struct directory *directory, const struct engine_criu *criu,
		      char lines[LOG_LINES][LOG_WIDTH])
{
	(void)directory, (void)criu, (void)lines;
	abort();
}

int criu_log_errors(const struct directory *directory, char lines[LOG_LINES][LOG_WIDTH])
{
	CHECK(directory_there && directory->path[0]);
	strcpy(lines[0], "Error (criu/cr-restore.c:1): no");
	return 1;
}

bool tree_stop_criu(pid_t criu)
{
	CHECK(criu == CRIU);
	return true;
}

bool tree_kill(struct tree tree)
{
	CHECK(tree.orphans && (tree.criu == CRIU || !criu_lives));
	tree_lives = tree_runs = false;
	return true;
}

int tree_traced(pid_t criu, uint32_t ids[MAX_TREE])
{
	CHECK(criu == CRIU);
	ids[0] = ROOT;
	return traced ? 1 : 0;
}

void tree_renice_zombies(struct tree tree, int nice)
{
	CHECK(tree.root == ROOT && tree_lives && !nice);
}

int priority_before(void) { return 0; }

/* It never gets on. */
static int64_t stalled_at;

void progress_begin(int64_t period_ms) { stalled_at = now + period_ms; }
bool progress_stalled(void) { return now >= stalled_at; }
int64_t progress_look_at(void) { return stalled_at; }

pid_t tree_tracer(pid_t pid) { return pid == ROOT && tree_lives ? CRIU : 0; }
bool populate_owns(pid_t pid) { return mappers && pid == 6000; }
void populate_end(void) { mappers = 0; }

/* Nobody's memory but the tree's. */
static void check_pids(const struct message *message)
{
	uint32_t left;
	struct mp_reader portions;
	struct mp_value number;

	if (message->op == OP_MAP) {
		CHECK(message_uint(message, KEY_PID) != 1);
		return;
	}
	portions = message_list(message, KEY_PORTIONS, &left);
	for (uint32_t i = 0; i < left; i++)
		CHECK(mp_read(&portions, &number) && (i % 3 || number.number != 1));
}

struct problem populate_start(struct session *session, const struct message *message)
{
	CHECK(restore.phase == HELD && session == restore.owner && tree_lives && !tree_runs);
	check_pids(message);
	mappers += message->op == OP_MAP;
	return (struct problem){.text = NULL};
}

void loop_watch(struct loop *loop, int fd, short events, callback call, void *context)
{
	CHECK(loop->count < (int)ARRAY_SIZE(loop->fds));
	loop->fds[loop->count] = (struct pollfd){.fd = fd, .events = events};
	loop->calls[loop->count] = call;
	loop->contexts[loop->count++] = context;
}

void loop_wake_at(struct loop *loop, int64_t deadline) { (void)loop, (void)deadline; }

static uint8_t answer[MAX_FRAME + 4];

bool session_has_input(const struct session *session)
{
	(void)session;
	return false;
}

struct writer session_writer(struct session *session, enum op op)
{
	struct writer writer;

	CHECK(session == &hosts[0] || session == &hosts[1]);
	message_open(&writer, answer, sizeof(answer), op);
	return writer;
}

void session_send(struct session *session, struct writer *writer)
{
	size_t size = message_close(writer);
	struct message message;

	CHECK(size && !message_parse(&message, answer + 4, size - 4));
	use_message(&message);
	session->answers++;
	if (message.op == OP_RESTORED)
		CHECK(said_go && tree_runs);
	if (message.op == OP_FAILED || message.op == OP_ABORTED)
		CHECK(!tree_lives && message_has(&message, KEY_UNDONE));
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
