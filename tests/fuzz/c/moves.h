/*
 * Moves, as a restore or dump sees them: the cgroups of a prepared tree, those of an earlier agent
 * with its CRIU, and the record of trees that run.
 *
 * A prepared tree is put back by its owner's word alone, or if nobody was told that it is prepared,
 * or the owner is told that there is no archive; it is killed by the other word alone, a container's
 * after podman has removed it.
 */
#define EARLIER_CRIU 4545
#define CONTAINER "c0ffee"

static const char *const ids[] = {
	"00000000000000000000000000000000",
	"10000000000000000000000000000000", /* does not freeze */
	"01000000000000000000000000000000", /* cannot be put back */
	"0",
};

static struct {
	bool on;       /* the tree is in the cgroups, */
	bool answered; /* and the host knows */
	bool removed, killed, emptied;
} prepared;
static struct {
	bool there, criu_lives, podmans;
} earlier;
static bool said_abort, marked;

static void earlier_acts(bool with_criu, bool podmans)
{
	if (earlier.there)
		earlier.criu_lives = false;
	else if (restore.phase == IDLE)
		earlier.there = true, earlier.criu_lives = with_criu, earlier.podmans = podmans;
}

static long fuzz_syscall(long number, pid_t pid, unsigned flags)
{
	CHECK(number == SYS_pidfd_open && pid == EARLIER_CRIU && !flags);
	return open("/dev/null", O_RDONLY | O_CLOEXEC);
}

struct problem freeze_tree(const char *move, pid_t criu, const char *container)
{
	CHECK(restore.phase == HELD && dump.on && criu == CRIU && !prepared.on);
	CHECK(dump.leaves ? dump.engine && !strcmp(container, CONTAINER) : !container);
	prepared.answered = prepared.killed = prepared.emptied = prepared.removed = false;
	prepared.on = move[0] == '0';
	return (struct problem){CODE_CGROUP, prepared.on ? NULL : "no"};
}

struct problem freeze_find(const char *move)
{
	CHECK(restore.phase == IDLE && strlen(move) == MOVE_ID);
	prepared.killed = prepared.emptied = prepared.removed = false;
	return (struct problem){CODE_DOUBT, earlier.there ? NULL : "no"};
}

const char *freeze_container(void)
{
	bool podmans =
		restore.dump && !restore.adopted ? prepared.on && dump.leaves : earlier.podmans;

	return podmans ? CONTAINER : "";
}

pid_t engine_start_removal(const char *container, int messages_fd)
{
	CHECK(said_go && restore.phase == PREPARED && !criu_lives && !engine_lives);
	CHECK(!strcmp(container, CONTAINER) && messages_fd >= 0 && !remover_lives);
	if (!host_reads) {
		errno = ENOENT;
		return -1;
	}
	remover_lives = true;
	return REMOVER;
}

static void end_remover(int status)
{
	remover_lives = false;
	prepared.removed = !status;
	CHECK(restore_reaped(REMOVER, status));
}

/* The host is about to be told that podman or CRIU failed. */
static bool pack_failed(void)
{
	return restore.phase == PACKING && restore.owner && !criu_lives && !engine_lives &&
	       restore.child_status;
}

pid_t freeze_tracer(void)
{
	CHECK(earlier.there);
	return earlier.criu_lives ? EARLIER_CRIU : 0;
}

bool freeze_undo(void)
{
	CHECK(restore.phase == PREPARED || restore.phase == PACKING);
	CHECK(said_abort || !prepared.answered || pack_failed());
	CHECK(!restore.container || !said_go);
	if (restore.adopted) {
		CHECK(said_abort && earlier.there);
		earlier.there = false;
	}
	prepared.on = false;
	return restore.move[1] == '0';
}

void freeze_kill(void)
{
	CHECK(said_go && restore.phase == RELEASED);
	CHECK(!restore.container || prepared.removed);
	prepared.killed = true;
}

bool freeze_emptied(void)
{
	CHECK(prepared.killed);
	if (!host_reads)
		return false; /* they take their time */
	if (restore.adopted)
		earlier.there = false;
	prepared.on = false;
	prepared.emptied = true;
	return true;
}

void freeze_forget(void)
{
	CHECK(!prepared.on || (said_go && prepared.killed));
	prepared.on = false;
}

struct problem freeze_list(struct moves *moves)
{
	*moves = (struct moves){.count = earlier.there};
	memcpy(moves->ids[0], ids[0], MOVE_ID + 1);
	return (struct problem){.text = NULL};
}

void moves_add(struct moves *moves, const char *id)
{
	CHECK(moves->count < MAX_DOUBTS);
	memcpy(moves->ids[moves->count++], id, MOVE_ID + 1);
}

void moves_remove(struct moves *moves, const char *id)
{
	CHECK(strlen(id) == MOVE_ID);
	moves->count = 0;
}

bool moved_mark(const char *move)
{
	CHECK(said_go && !dump.on && restore.phase == HELD && strlen(move) == MOVE_ID);
	marked = move[0] == '0';
	return marked;
}

void moved_unmark(const char *move)
{
	CHECK(marked && !tree_runs && !strcmp(move, restore.move));
	marked = false;
}

bool moved_is_marked(const char *move)
{
	(void)move;
	return marked;
}
