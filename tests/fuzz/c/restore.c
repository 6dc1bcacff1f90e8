/*
 * One restore or dump at a time (restore*.c, dump.c, prepare.c, container.c): two hosts, CRIU, its hooks
 * and the clock do anything in any order.
 *
 * No tree of a restore is let go but by its owner's word while it is held; no
 * hook ends before the tree is dead or let go. No tree of a dump ends but by
 * that word, even if a hook is killed, and nobody kills its CRIU. A prepared one
 * waits for a word of its owner's (moves.h), a container's without its CRIU once
 * its archive is made. When all is over, nothing is left open.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROTOCOL_TABLES
#include "fuzz.h"

struct session {
	bool broken;
	size_t answers;
};

static int fuzz_kill(pid_t pid, int number);
static int fuzz_prctl(int option, unsigned long value);
static long fuzz_syscall(long number, pid_t pid, unsigned flags);

#define kill fuzz_kill
#define prctl fuzz_prctl
#define syscall fuzz_syscall
#include "../../../ovr/guest/restore.c"
#include "../../../ovr/guest/restore_end.c"
#include "../../../ovr/guest/restore_hook.c"
#include "../../../ovr/guest/dump.c"
#include "../../../ovr/guest/prepare.c"
#include "../../../ovr/guest/container.c"
#undef kill
#undef prctl
#undef syscall

#define CRIU 4242
#define ROOT 5000
#define ENGINE 4343
#define REMOVER 4444 /* podman, which removes a container */

struct options options;

static struct session hosts[2];
static int64_t now;
static int hook = -1; /* CRIU's action script: our end of its connection */
static bool criu_lives, engine_lives, remover_lives, said_archive, subreaper, directory_there,
	said_go, tree_lives, tree_runs, traced;
static bool host_reads = true;
static int room; /* for messages in the buffer of what is sent to the host */
static int mappers;
static struct dump {
	bool on;           /* CRIU was started for a dump, */
	bool killed;       /* and killed */
	bool engine;       /* by an engine, */
	bool leaves;       /* to let the tree run on, */
	bool adopted;      /* and known to the agent since its first hook */
	bool may_stop;     /* the agent has let it stop the tree */
	int hooks;         /* its post-dump hooks so far */
	bool last_is_post; /* the present hook is such a one */
	bool refused;      /* one of them did not end well */
	bool succeeded;    /* as CRIU does after two good ones, */
	bool tree_ended;   /* and ends the tree then */
} dump;

#include "moves.h"
#include "rest_of_agent.h"
#include "link_to_hosts.h"

/* ------------------------------------------------------------------------ what happens */

/* What has ended wakes the agent no more while it waits for a decision. */
static void check_it_rests(const struct loop *loop)
{
	CHECK(loop->deadline < 0);
	for (int i = 0; i < loop->count; i++)
		CHECK(loop->fds[i].fd != restore.theirs.end);
}

static void turn(void)
{
	static struct loop loop;

	restore_work();
	if (host_reads)
		room = 2;
	loop.count = 0;
	loop.deadline = -1;
	restore_watch(&loop);
	/* Nothing else wakes the loop. */
	if (restore.phase == SAVING && room > 0)
		CHECK(loop.deadline >= 0 && loop.deadline <= now);
	if (restore.phase == PREPARED && !stop_at)
		check_it_rests(&loop);
	if (poll(loop.fds, (nfds_t)loop.count, 0) > 0)
		for (int i = 0; i < loop.count; i++)
			if (loop.fds[i].revents)
				loop.calls[i](loop.fds[i].fd, loop.fds[i].revents,
					      loop.contexts[i]);
}

/* A dump's CRIU exits with 0 if it has ended the tree, or was to let it run on. */
static int exit_status(uint8_t code)
{
	if (dump.on)
		code = dump.succeeded ? 0 : code | 1;
	return code << 8;
}

/* An engine succeeds if its CRIU has ended well and there is room, and may be killed before. */
static void engine_ends(bool killed, bool fails)
{
	end_engine(killed ? SIGKILL : (criu_lives || !dump.succeeded || fails) << 8);
}

/*
 * CRIU ends the tree if its hooks end well, or are killed: but for a second one that is killed, too,
 * against which there is no remedy.
 */
static void dump_hook_ends(bool told, bool killed)
{
	CHECK(!told || said_go || said_archive);
	if (killed && dump.hooks == 2)
		killed = false;
	if (!told && !killed)
		dump.refused = true;
	if (criu_lives && dump.hooks == 2 && !dump.refused) {
		CHECK(said_go || said_archive);
		dump.succeeded = true;
		dump.tree_ended = !dump.leaves;
	}
}

/* CRIU goes on when its script has ended, by the word that it was given or without. */
static void hook_ends(bool killed)
{
	char word = 0;
	bool told = hook >= 0 && recv(hook, &word, 1, MSG_DONTWAIT) == 1;

	if (hook < 0)
		return;
	if (told && word == HOOK_PREPARED)
		told = recv(hook, &word, 1, MSG_DONTWAIT) == 1;
	CHECK(!told || word != HOOK_PREPARED);
	if (dump.on && dump.last_is_post)
		dump_hook_ends(told && word == HOOK_GO, killed);
	if (told && tree_lives && word == HOOK_GO && said_go)
		tree_runs = true;
	close(hook);
	hook = -1;
}

static pid_t some_root(uint8_t value)
{
	if (value & 1)
		return ROOT;
	return value & 2 ? ROOT + 1 : 0;
}

static void hook_comes(struct input *input)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	uint8_t what = input_byte(input);
	struct hook_report report = {some_root(what), what & 4 ? CRIU + 1 : CRIU};
	size_t size = what & 8 ? input_byte(input) % (sizeof(report) + 1) : sizeof(report);
	const char *temporary = getenv("TMPDIR");

	if (hook >= 0 || !criu_lives || (dump.on && report.root && dump.hooks == 2))
		return;
	dump.last_is_post = report.root;
	if (dump.on && report.root)
		dump.hooks++;
	snprintf(address.sun_path, sizeof(address.sun_path), "%s/hook",
		 temporary ? temporary : "/tmp");
	hook = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0);
	CHECK(hook >= 0);
	if (connect(hook, (struct sockaddr *)&address, sizeof(address)) < 0) {
		close(hook);
		hook = -1;
		dump.refused = true;
		return;
	}
	traced = !(what & 16);
	if (report.root && !dump.on)
		tree_lives = true;
	send(hook, &report, size, MSG_NOSIGNAL);
}

/* Required fields of a message that do not matter here. */
static void add_rest(struct writer *writer, enum op op, uint64_t given)
{
	for (int i = 0; i < schemas[op].count; i++) {
		const struct field *field = &schemas[op].fields[i];

		if (field->optional || given >> field->key & 1)
			continue;
		if (field->kind >= KIND_UINTS)
			message_add_list(writer, field->key, 0);
		else if (field->kind == KIND_UINT)
			message_add_uint(writer, field->key, 0);
		else if (field->kind == KIND_BOOL)
			message_add_bool(writer, field->key, false);
		else if (field->kind == KIND_STR)
			message_add_str(writer, field->key, "");
		else
			message_add_bin(writer, field->key, "", 0);
	}
}

static void add_container(struct writer *writer, uint8_t value)
{
	static const char *const names[] = {"web", "web", "", "--all"};

	message_add_bool(writer, KEY_LEAVE_RUNNING, value & 32);
	if (!(value & 1))
		return;
	message_add_str(writer, KEY_ENGINE, value & 2 ? "podman" : "sh");
	if (!(value & 4))
		message_add_str(writer, KEY_NAME, names[value >> 3 & 3]);
}

/* What starts CRIU; returns the fields that were given. */
static uint64_t add_start(struct writer *writer, enum op op, uint8_t value, struct input *input)
{
	uint8_t more = input_byte(input);
	bool by_engine = op == OP_DUMP && (more & 7) == 6;

	message_add_uint(writer, KEY_SILENCE_MS, 100u * (value & 15));
	message_add_uint(writer, KEY_TIMEOUT_MS, 100u * (value >> 4));
	message_add_uint(writer, KEY_LOG_LEVEL, more & 7);
	message_add_uint(writer, KEY_STALL_MS, 100u * (31 - (more >> 3)));
	if (op == OP_DUMP) {
		message_add_uint(writer, KEY_PID, value ? ROOT : 1);
		if (by_engine)
			add_container(writer, input_byte(input));
	}
	if (op == OP_BEGIN && (value & 15) == 3)
		message_add_str(writer, KEY_MOVE, ids[more >> 3 & 3]);
	return 1ull << KEY_SILENCE_MS | 1ull << KEY_TIMEOUT_MS | 1ull << KEY_LOG_LEVEL |
	       1ull << KEY_STALL_MS | (op == OP_DUMP ? 1ull << KEY_PID : 0) |
	       (by_engine ? 1ull << KEY_LEAVE_RUNNING : 0);
}

static uint64_t some_pid(uint8_t value)
{
	if (value & 1)
		return ROOT;
	return value & 2 ? 6000 : 1;
}

/* What says which task, image or pages a message is about. */
static uint64_t add_object(struct writer *writer, enum op op, uint8_t value)
{
	switch (op) {
	case OP_FETCH:
		message_add_str(writer, KEY_NAME, value & 1 ? "pages-1.img" : "core-1.img");
		return 1ull << KEY_NAME;
	case OP_PREPARE:
	case OP_ADOPT:
	case OP_MOVED: message_add_str(writer, KEY_MOVE, ids[value & 3]); return 1ull << KEY_MOVE;
	case OP_TRACK: message_add_bool(writer, KEY_STOP, value & 1); return 1ull << KEY_STOP;
	case OP_MAP: message_add_uint(writer, KEY_PID, some_pid(value)); return 1ull << KEY_PID;
	case OP_TOUCH:
		message_add_list(writer, KEY_PORTIONS, 6);
		for (int i = 0; i < 2; i++) {
			message_item_uint(writer, some_pid(i ? value >> 2 : value));
			message_item_uint(writer, value >> 4 & 3);
			message_item_uint(writer, 1);
		}
		return 1ull << KEY_PORTIONS;
	default: return 0;
	}
}

/* What the owner says, where it may. */
static void note_decision(enum op op, const struct session *host)
{
	bool owns = restore.owner == host, prepared_here = owns && restore.phase == PREPARED;

	if (op == OP_GO && owns &&
	    (restore.phase == HELD || (prepared_here && (!restore.container || restore.packed))))
		said_go = true;
	said_archive |= op == OP_ARCHIVE && prepared_here && restore.container && !restore.packed;
	said_abort = op == OP_ABORT && !restore.decided &&
		     (prepared_here || (owns && restore.phase == PACKING));
}

static void host_speaks(struct input *input, struct session *host)
{
	static const enum op ops[] = {OP_FILES, OP_BEGIN, OP_TOUCH, OP_MAP,   OP_GO,
				      OP_ABORT, OP_DUMP,  OP_TRACK, OP_FETCH, OP_FREEZE};
	static const enum op of_moves[] = {OP_PREPARE, OP_ADOPT, OP_DOUBTS, OP_MOVED, OP_ARCHIVE};
	uint8_t which = input_byte(input);
	enum op op = which < 240 ? ops[which % ARRAY_SIZE(ops)] :
				   of_moves[(which - 240) % ARRAY_SIZE(of_moves)];
	static uint8_t frame[4096];
	struct message message;
	struct writer writer;
	size_t size;
	uint8_t value = input_byte(input);
	uint64_t given = 0;

	message_open(&writer, frame, sizeof(frame), op);
	if (op == OP_FILES && !value) {
		/* Which names are good is another target's affair. */
		given = 1ull << KEY_NAMES;
		message_add_list(&writer, KEY_NAMES, 1);
		message_item_str(&writer, "more names than contents");
	} else if (op == OP_BEGIN || op == OP_DUMP) {
		given = add_start(&writer, op, value, input);
	} else {
		given = add_object(&writer, op, value);
	}
	add_rest(&writer, op, given);
	size = message_close(&writer);
	CHECK(size && !message_parse(&message, frame + 4, size - 4));
	note_decision(op, host);
	restore_session_heard(host);
	if (which < 240)
		restore_message(host, &message);
	else
		move_message(host, &message);
}

/* podman, another engine, or CRIU */
static void program_ends(struct input *input, uint8_t what)
{
	if (remover_lives) {
		end_remover(what & 8 ? 125 << 8 : 0);
	} else if (engine_lives && what & 32) {
		engine_ends(what & 16, what & 8);
	} else if (criu_lives) {
		/* It is stopped at its hook; after "go" its end lets the tree go, too. */
		if (said_go)
			tree_runs = tree_lives;
		end_criu(what & 8 ? SIGKILL : exit_status(input_byte(input)));
	}
}

static void step(struct input *input)
{
	uint8_t what = input_byte(input);
	struct session *host = &hosts[what >> 7];

	host_reads = !(what & 64);
	switch (what & 7) {
	case 0:
	case 1: host_speaks(input, host); break;
	case 2: hook_comes(input); break;
	case 3: hook_ends(what & 8); break;
	case 4: program_ends(input, what); break;
	case 5: now += 100 * (int64_t)input_byte(input); break;
	case 6: restore_session_ended(host); break;
	default:
		if (what & 32)
			earlier_acts(what & 16, what & 8);
		else if (what & 8)
			worker_acts(what & 16);
		else
			restore_session_heard(host);
	}
	/* A connection, what came on it, and what follows of that. */
	for (int i = 0; i < 3; i++)
		turn();
	CHECK(worker == NO_WORKER || (restore.phase == TRACKING && criu_lives));
	CHECK(!(tree_runs || dump.tree_ended) || said_go);
	CHECK(!dump.on || !criu_lives || !known_criu() || restore.phase >= BUILDING);
	CHECK(!prepared.on || (restore.phase >= PREPARED && restore.phase <= RELEASED));
	CHECK(remover_lives == (restore.phase == REMOVING));
	CHECK(!remover_lives || now < restore.late_at);
	CHECK(!tree_runs || !restore.move[0] || marked);
	/* A new one begins with nothing of the last. */
	if (restore.phase == IDLE) {
		hook_ends(false);
		dump = (struct dump){.on = false};
		CHECK(restore.hook < 0 && restore.listener < 0 && !directory_there && !mappers);
		CHECK(!restore.owner && !subreaper && (!tree_lives || tree_runs));
		criu_lives = criu_lives && said_go;
		tree_lives = tree_runs = said_go = false;
		criu_lives = engine_lives = marked = said_archive = false;
	}
}

/* It is in doubt, and for ever would be. */
static void decide(void)
{
	static uint8_t frame[64];
	struct message message;
	struct writer writer;
	size_t size;

	message_open(&writer, frame, sizeof(frame), restore.decided ? OP_GO : OP_ABORT);
	size = message_close(&writer);
	CHECK(!message_parse(&message, frame + 4, size - 4) && !restore_lingers());
	restore.owner = &hosts[0];
	host_reads = true;
	note_decision(message.op, restore.owner);
	restore_message(restore.owner, &message);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, data + size};

	host_reads = true;
	room = 0;
	traced = false;
	while (input_left(&input))
		step(&input);
	restore_shutdown();
	if (restore.phase == PREPARED)
		decide();
	hook_ends(false);
	earlier.criu_lives = false;
	for (int i = 0; restore.phase != IDLE; i++) {
		CHECK(i < 6);
		if (restore.phase == PREPARED) {
			decide();
			continue;
		}
		CHECK(restore.phase == RELEASED || restore_lingers());
		if (criu_lives)
			end_criu(exit_status(0));
		if (engine_lives)
			engine_ends(false, false);
		if (remover_lives)
			end_remover(0);
		host_reads = true;
		turn();
	}
	stop_at = 0;
	CHECK(restore.hook < 0 && restore.listener < 0 && !directory_there);
	criu_lives = engine_lives = tree_lives = tree_runs = said_go = marked = false;
	said_archive = false;
	CHECK(!prepared.on && !remover_lives);
	earlier.there = false;
	dump = (struct dump){.on = false};
	return 0;
}
