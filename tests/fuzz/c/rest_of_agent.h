/*
 * The rest of the agent, as a restore or dump sees it: a model of CRIU, its tree, and the host's
 * link. The tree of a restore is made by CRIU (tree_lives, tree_runs). That of a dump is always
 * there, and ends only when CRIU believes its hooks (restore.c).
 */

int64_t now_ms(void) { return now; }
void sleep_ms(int ms) { now += ms; }
void complain(const char *format, ...) { (void)format; }

static void end_criu(int status)
{
	criu_lives = false;
	dump.killed = WIFSIGNALED(status);
	if (!dump.engine)
		CHECK(restore_reaped(CRIU, status) == (restore.phase >= BUILDING));
}

/* An engine's CRIU that has not run its hook is not known, and gives up when it does. */
static bool known_criu(void) { return !dump.engine || dump.adopted; }

static void end_engine(int status)
{
	engine_lives = false;
	CHECK(restore_reaped(ENGINE, status) == (restore.phase >= BUILDING));
}

void reap_children(void) {}

static int fuzz_kill(pid_t pid, int number)
{
	if (pid == ENGINE) {
		CHECK(number == SIGKILL && dump.engine && known_criu() && !criu_lives);
		CHECK(restore.phase == ENDING);
		end_engine(SIGKILL);
		return 0;
	}
	if (pid == REMOVER) {
		CHECK(number == SIGKILL && restore.phase == REMOVING && !criu_lives);
		end_remover(SIGKILL);
		return 0;
	}
	CHECK(pid == CRIU && (!dump.on || number == SIGCONT));
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
	/* CRIU releases the tree of a dump, and is not left alone before. */
	CHECK(!dump.on || !criu_lives || !known_criu());
	CHECK(!restore.adopted || !directory->path[0]);
	if (directory->path[0]) {
		snprintf(path, sizeof(path), "%s/hook", directory->path);
		unlink(path);
	}
	directory_there = false;
	close_fd(&directory->dump);
	*directory = (struct directory){.images = -1, .dump = -1};
}

bool criu_command_make(struct criu_command *command, const struct directory *directory,
		       const struct message *begin)
{
	static char *none[] = {NULL};

	(void)directory;
	command->strings = none;
	errno = ENOENT;
	return message_uint(begin, KEY_LOG_LEVEL) != 7;
}

void criu_command_free(struct criu_command *command) { (void)command; }

pid_t criu_start(const struct criu_command *command)
{
	CHECK(directory_there && !criu_lives && subreaper == !restore.dump);
	criu_lives = true;
	dump = (struct dump){.on = restore.dump, .leaves = restore.leave_running};
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

/* CRIU's images, made once. */
bool directory_make_dump(struct directory *directory)
{
	static const char *const files[] = {"core-1.img", "inventory.img", "pages-1.img"};
	const char *temporary = getenv("TMPDIR");
	char path[300];
	int fd;

	CHECK(directory_there && directory->dump < 0);
	snprintf(path, sizeof(path), "%s/dump", temporary ? temporary : "/tmp");
	if (mkdir(path, 0700) == 0)
		for (size_t i = 0; i < ARRAY_SIZE(files); i++) {
			snprintf(path, sizeof(path), "%s/dump/%s", temporary ? temporary : "/tmp",
				 files[i]);
			fd = open(path, O_WRONLY | O_CREAT, 0600);
			CHECK(fd >= 0 && write(fd, path, 100) == 100 && close(fd) == 0);
		}
	snprintf(path, sizeof(path), "%s/dump/parent", temporary ? temporary : "/tmp");
	CHECK(symlink("/etc", path) == 0 || errno == EEXIST);
	snprintf(path, sizeof(path), "%s/dump", temporary ? temporary : "/tmp");
	directory->dump = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return directory->dump >= 0;
}

/* The worker that looks after soft-dirty bits: it acts or dies when the input says so. */
static enum { NO_WORKER, FREEZING, FROZEN, CLEARING } worker;

bool track_begin(pid_t root, bool look)
{
	CHECK(restore.phase == TRACKING && root == ROOT && worker == NO_WORKER);
	worker = look ? FREEZING : CLEARING;
	return true;
}

bool track_under_way(void) { return worker != NO_WORKER; }
bool track_may_look(void) { return worker == FROZEN; }
void track_end(void) { worker = NO_WORKER; }

void track_looked(void)
{
	CHECK(worker == FROZEN);
	worker = CLEARING;
}

static void worker_acts(bool dies)
{
	if (worker == NO_WORKER)
		return;
	if (dies) {
		track_end();
		restore_abort(CODE_TREE, "the tree cannot be frozen");
	} else if (worker == CLEARING) {
		track_end();
		dump.may_stop |= restore.tracked;
		dump_tracked(1);
	} else if (worker == FREEZING) {
		worker = FROZEN;
		dump_frozen();
	}
}

void oom_hide(pid_t pid) { CHECK(pid == CRIU && criu_lives); }
void priority_raise(pid_t pid) { (void)pid; }
void priority_reset(pid_t pid) { (void)pid; }
void priority_real_time(pid_t pid) { (void)pid; }
const char *exitkill_set(pid_t criu)
{
	CHECK(criu == CRIU);
	return NULL;
}
pid_t tree_parent(pid_t pid) { return pid == ROOT ? CRIU : 0; }

/* Engines dump here, and restore nothing. */
bool engine_known(const char *name) { return !strcmp(name, "podman"); }
bool engine_is_podman(const char *name) { return !strcmp(name, "podman"); }
bool engine_criu_ended(const struct engine_criu *criu)
{
	CHECK(criu->end >= 0 && (dump.adopted || restore.criu == EARLIER_CRIU));
	if (restore.adopted)
		return !earlier.criu_lives;
	return !criu_lives;
}
void engine_forget(struct engine_criu *criu)
{
	close_fd(&criu->end);
	*criu = (struct engine_criu){.end = -1, .log = -1};
}

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

struct engine_criu engine_adopt(pid_t criu, const char *log)
{
	CHECK(criu == CRIU && criu_lives && dump.engine && !strcmp(log, "dump.log"));
	dump.adopted = true;
	return (struct engine_criu){
		.end = open("/dev/null", O_RDONLY | O_CLOEXEC), .log = -1, .container = CONTAINER};
}

pid_t engine_start_dump(struct directory *directory, const struct message *message)
{
	char name[MAX_STRING];

	message_str(message, KEY_NAME, name);
	CHECK(!strcmp(name, "web") && directory_there && directory->dump < 0 && !criu_lives);
	if (message_uint(message, KEY_LOG_LEVEL) == 7) {
		errno = ENOENT;
		return -1;
	}
	criu_lives = engine_lives = true;
	dump = (struct dump){
		.on = true, .engine = true, .leaves = message_uint(message, KEY_LEAVE_RUNNING)};
	return ENGINE;
}

bool engine_open_images(struct directory *directory, pid_t criu)
{
	CHECK(criu == CRIU && dump.adopted);
	return directory_make_dump(directory);
}

void engine_strip_images(const struct directory *directory)
{
	CHECK((said_go || said_archive) && dump.engine && directory->dump >= 0);
}

bool engine_criu_gave_up(const struct engine_criu *criu)
{
	CHECK(criu->end < 0 || !criu_lives);
	return criu->end < 0 || (!dump.killed && !dump.succeeded);
}

bool engine_criu_succeeded(const struct engine_criu *criu)
{
	CHECK(criu->end >= 0 && !criu_lives);
	return dump.succeeded;
}

bool archive_is_sent(void)
{
	CHECK(restore.phase == RELEASED || restore.phase == PACKING);
	CHECK(dump.engine && !engine_lives);
	return host_reads || !restore.owner;
}
bool archive_is_awaited(void)
{
	return (restore.phase == RELEASED || restore.phase == PACKING) && restore.owner &&
	       dump.engine && !restore.packed;
}
void archive_host_is_silent(void)
{
	CHECK(archive_is_awaited());
	if (restore.phase == PACKING)
		session_break(restore.owner, CODE_SILENT, "silent");
	else
		restore.owner = NULL;
}
void archive_watch(struct loop *loop) { (void)loop; }
void archive_forget(void) {}
/* Nothing of what CRIU writes stays with podman, and CRIU writes no more. */
void engine_remove_images(const struct directory *directory)
{
	(void)directory;
	CHECK(!dump.engine || !criu_lives || !known_criu());
}
bool tree_descends(pid_t pid, pid_t ancestor)
{
	CHECK(ancestor == ENGINE);
	return pid == CRIU;
}
bool tree_task_lives(pid_t pid)
{
	CHECK(pid == ROOT && !criu_lives);
	/* It may take its time to die. */
	return true;
}

void engine_result(const struct directory *directory, char line[LOG_WIDTH])
{
	(void)directory, (void)line;
	abort();
}

int engine_log_errors(const struct directory *directory, const struct engine_criu *criu,
		      char lines[LOG_LINES][LOG_WIDTH])
{
	(void)criu;
	CHECK(directory->path[0] && dump.engine && !engine_lives);
	strcpy(lines[0], "Error: no");
	return 1;
}

int log_collect(int fd, const char *word, char lines[LOG_LINES][LOG_WIDTH], int count)
{
	CHECK(fd >= 0 && !*word && !count);
	strcpy(lines[0], "Error: no");
	return 1;
}

int criu_log_errors(const struct directory *directory, char lines[LOG_LINES][LOG_WIDTH])
{
	CHECK(directory_there && directory->path[0]);
	strcpy(lines[0], "Error (criu/cr-restore.c:1): no");
	return 1;
}

bool tree_stop_criu(pid_t criu)
{
	CHECK(criu == CRIU && !dump.on);
	return true;
}

bool tree_kill(struct tree tree)
{
	CHECK(!dump.on && tree.orphans && (tree.criu == CRIU || !criu_lives));
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

pid_t tree_tracer(pid_t pid)
{
	return pid == ROOT && (tree_lives || (criu_lives && dump.hooks)) ? CRIU : 0;
}
/* Of a prepared container, which its CRIU has let go. */
bool freeze_owns(pid_t pid)
{
	CHECK(restore.phase == PREPARED && restore.packed);
	return pid == ROOT;
}
bool populate_owns(pid_t pid) { return mappers && pid == 6000; }
void populate_end(void) { mappers = 0; }

/* Nobody's memory but the tree's, and that of a dump's tree only to read it. */
static void check_pids(const struct message *message)
{
	uint32_t left;
	struct mp_reader portions;
	struct portion portion;

	if (message->op == OP_MAP) {
		CHECK(message_uint(message, KEY_PID) != 1);
		return;
	}
	portions = message_list(message, KEY_PORTIONS, &left);
	for (; left >= 3; left -= 3) {
		CHECK(read_portion(&portions, &portion) && portion.pid != 1);
		CHECK(!dump.on || portion.pid != ROOT || portion.how == TOUCH_READ);
	}
}

struct problem populate_start(struct session *session, const struct message *message)
{
	bool packed = restore.phase == PREPARED && restore.packed;

	CHECK(session == restore.owner && (restore.phase == HELD || packed));
	CHECK(packed || (dump.on ? dump.hooks > 0 : tree_lives && !tree_runs));
	CHECK(!packed || message->op == OP_TOUCH);
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

void loop_wake_at(struct loop *loop, int64_t deadline)
{
	if (loop->deadline < 0 || deadline < loop->deadline)
		loop->deadline = deadline;
}
