/*
 * ovr-agent: the part of ovr that runs in the guest.
 *
 * One thread, one poll loop, no allocation that a peer could make grow. Every
 * file offers the loop the descriptors it waits for (xxx_watch) and is called
 * back; a callback may end any session or restore, so callbacks find their
 * object again by descriptor and do nothing when it is gone.
 */
#ifndef OVR_AGENT_H
#define OVR_AGENT_H

#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <unistd.h>

#include "msgpack.h"
#include "protocol.h"

#define AGENT_VERSION "0.1.0"
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

/* Sessions whose host sends nothing more than a hello keep others out: few, but not one. */
#define MAX_SESSIONS 16

struct options {
	unsigned vsock_port;
	const char *serial; /* the port's name, or NULL */
	const char *dir;
	const char *criu;
	const char *unix_path, *unix_serial; /* lab builds, for tests without a VM */
};

extern struct options options;

static inline void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* loop.c */
typedef void (*callback)(int fd, short events, void *context);

struct loop {
	struct pollfd fds[9 + 5 * MAX_SESSIONS];
	callback calls[9 + 5 * MAX_SESSIONS];
	void *contexts[9 + 5 * MAX_SESSIONS];
	int count;
	int64_t deadline; /* ms, or -1 */
};

int64_t now_ms(void);
void loop_watch(struct loop *loop, int fd, short events, callback call, void *context);
void loop_wake_at(struct loop *loop, int64_t deadline);
void loop_run(struct loop *loop);
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
void reap_children(void);
void sleep_ms(int ms);

/* message.c: the schema of protocol.py and lab_protocol.py, decoded and encoded */
struct message {
	enum op op;
	uint64_t present; /* bit KEY_x: the field is there */
	struct mp_value field[KEY_COUNT];
};

const char *message_parse(struct message *message, const uint8_t *body, size_t size);
bool message_has(const struct message *message, enum key key);
uint64_t message_uint(const struct message *message, enum key key);
void message_str(const struct message *message, enum key key, char text[MAX_STRING]);
/* An array of strings as argv wants it; one block to free, NULL when memory is short. */
char **message_strings(const struct message *message, enum key key);
/* A reader of an array field's elements. */
struct mp_reader message_list(const struct message *message, enum key key, uint32_t *count);

struct writer {
	uint8_t *start, *at, *end;
	unsigned fields;
	bool overflow;
};

void message_open(struct writer *writer, uint8_t *buffer, size_t size, enum op op);
void message_add_uint(struct writer *writer, enum key key, uint64_t number);
void message_add_bool(struct writer *writer, enum key key, bool value);
void message_add_str(struct writer *writer, enum key key, const char *text);
void message_add_bin(struct writer *writer, enum key key, const void *data, size_t size);
void message_add_list(struct writer *writer, enum key key, uint32_t count);
void message_item_uint(struct writer *writer, uint64_t number);
void message_item_str(struct writer *writer, const char *text);
void message_item_bin(struct writer *writer, const void *data, size_t size);
/* Completes the frame; its size, or 0 when it did not fit. */
size_t message_close(struct writer *writer);

/* Why something cannot be done; without a text nothing is the matter. */
struct problem {
	enum code code;
	const char *text;
};

const char *code_name(enum code code);
/* What the host is told of an errno. */
enum code code_of_errno(int error);

/* session.c */
struct session;

enum link {
	LINK_STREAM, /* a connection is a session */
	LINK_SERIAL, /* sessions follow each other on one connection, each begins with a sync */
	LINK_PORT,   /* the same, and the descriptor outlives the host's connection */
};

bool session_start(int fd, enum link link);
int session_index(const struct session *session);
/* Answer with an error; the session goes on. */
void session_refuse(struct session *session, enum code code, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* Answer with an error and end the session. */
void session_break(struct session *session, enum code code, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* session_io.c */
struct writer session_writer(struct session *session, enum op op);
void session_send(struct session *session, struct writer *writer);
/* Room for bulk output without crowding out answers. */
bool session_has_room(const struct session *session);
void session_watch(struct loop *loop);
/* Everything that can be done without waiting; sessions end only here. */
void session_work(void);

/* transport.c */
void transport_watch(struct loop *loop);
/* The serial port itself is gone. */
void transport_port_lost(void);
/* A descriptor that becomes readable when the host comes back to the port. */
int transport_port_waiter(void);
bool transport_port_connected(int fd);

/* restore.c */
void restore_message(struct session *session, const struct message *message);
void restore_session_ended(struct session *session);
void restore_session_heard(struct session *session);
bool restore_reaped(pid_t pid, int status);
void restore_watch(struct loop *loop);
/* Deadlines and the end of CRIU. */
void restore_work(void);
/* What was to be said is said. */
void restore_rest(void);
void restore_shutdown(void);

/* images.c: the private directory of a restore */
struct directory {
	char path[256]; /* empty: there is none */
	int images;     /* descriptor of path/images */
	unsigned files;
	uint64_t bytes;
};

bool directory_prepare_base(void);
struct problem directory_make(struct directory *directory);
struct problem directory_append(struct directory *directory, const struct mp_value *name,
				const struct mp_value *data);
/* Links to some of the images, as if they were those of an earlier dump. */
bool directory_make_parent(const struct directory *directory, char **names);
void directory_remove_parent(const struct directory *directory);
void directory_remove(struct directory *directory, bool keep_log);

#define AGENT_PATH "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* criu.c */
/* To be called while the program's file is still that of this process. */
bool criu_know_program(void);

/* How CRIU is started for a restore; pointers lead into it and into `strings`. */
struct criu_command {
	char images[300], level[16], output[300], socket[300];
	char *env[3], **argv, **strings;
};

/* False, and errno. To be freed in any case. */
bool criu_command_make(struct criu_command *command, const struct directory *directory,
		       const struct message *begin);
void criu_command_free(struct criu_command *command);
/* CRIU's pid, or -1 and errno. */
pid_t criu_start(const struct criu_command *command);
#define LOG_LINES 16
#define LOG_WIDTH 256
int criu_log_errors(const struct directory *directory, char lines[LOG_LINES][LOG_WIDTH]);
/* Add the last lines of a file with that word in them to `count` others; how many there are then. */
int log_collect(int fd, const char *word, char lines[LOG_LINES][LOG_WIDTH], int count);
/* The path of this very program, which CRIU starts as its action script; NULL and errno. */
const char *criu_program(void);
const char *criu_version(void);

/* engine.c: podman and the like, who run CRIU for us */
#define ENGINE_OUT "engine.out"
#define ENGINE_ERR "engine.err"

/* Their CRIU. Descriptors are -1 while it is not known. */
struct engine_criu {
	int end; /* readable once it has ended */
	int log;
	pid_t runtime;      /* its parent, and the parent of the tree that it makes */
	char container[65]; /* podman's id of what it restores; empty: not known */
};

bool engine_known(const char *name);
void engine_add_installed(struct writer *writer);

/* config.c: what CRIU would read of its configuration files */
void config_message(struct session *session);
/* Its pid, or -1 and errno. */
pid_t engine_start(const struct directory *directory, const struct message *begin);
struct engine_criu engine_adopt(pid_t criu);
/*
 * Have what a failed restore has left removed, step by step, each a child: its pid, 0 if there is
 * nothing to do in this step, -1 after the last one.
 */
pid_t engine_clean_up(int step, const struct engine_criu *criu);
bool engine_criu_ended(const struct engine_criu *criu);
void engine_forget(struct engine_criu *criu);
void engine_forget_names(void);
void engine_result(const struct directory *directory, char line[LOG_WIDTH]);
int engine_log_errors(const struct directory *directory, const struct engine_criu *criu,
		      char lines[LOG_LINES][LOG_WIDTH]);

/* hook.c */
#define HOOK_SOCKET "OVR_HOOK_SOCKET"
#define HOOK_GO 'g' /* the agent's only word: go on */

struct hook_report {
	int32_t root, criu; /* root 0: pre-restore or post-restore, nothing is held yet */
};

int hook_main(const char *action);

/* tree.c: finding and killing the tree that CRIU makes */
#define MAX_TREE MAX_LIST

struct tree {
	pid_t criu, root; /* 0: none, or gone */
	bool orphans;     /* unknown children of this process belong to it too */
	pid_t runtime;    /* so do the children of this one; 0: none */
	pid_t engine;     /* has started CRIU, or will; 0: none */
};

bool tree_stop_criu(pid_t criu);
/* Kill and wait until no task lives; CRIU must be stopped or gone. */
bool tree_kill(struct tree tree);
/* Ids of the threads that CRIU traces; -1 when there are too many. */
int tree_traced(pid_t criu, uint32_t ids[MAX_TREE]);
/* Give the zombies of a tree this nice value. */
void tree_renice_zombies(struct tree tree, int nice);
/* The tracer of a task, or 0. */
pid_t tree_tracer(pid_t pid);
/* The parent of a task, or 0. */
pid_t tree_parent(pid_t pid);

/* exitkill.c */
/* Have the kernel kill what CRIU, which is stopped, traces when CRIU dies. NULL, or why not. */
const char *exitkill_set(pid_t criu);

/* What a Touch has of one process: how many of its ranges are meant, and whether to keep pages. */
struct portion {
	uint64_t pid, keep, count;
};

static inline bool read_portion(struct mp_reader *reader, struct portion *portion)
{
	struct mp_value pid, keep, count;

	if (!mp_read(reader, &pid) || !mp_read(reader, &keep) || !mp_read(reader, &count))
		return false;
	*portion = (struct portion){pid.number, keep.number, count.number};
	return true;
}

/* touch.c */
/*
 * Have pages of held tasks allocated, as a Touch has them; 0, or an errno.
 * Only in a child that ends afterwards.
 */
int touch_portions(struct mp_reader portions, struct mp_reader ranges);
/*
 * Whatever its protection is: the kernel makes a page of the task's own first.
 * Where nothing is to be kept nothing is read, since to read a page of a file
 * maps its neighbours as well.
 */
bool touch_forced(int mem, uint64_t at, bool keep);

/* priority.c: being served first while a restore is under way, in a guest that is busy */
/* Before other processes and other sessions; 0: this process. It may fail, and then takes longer. */
void priority_raise(pid_t pid);
/* At once when it wakes up; 0: this process. For who makes no tasks that stay. */
void priority_real_time(pid_t pid);
/* In a child that is to become another program: as this process was before it was raised. */
void priority_of_child(void);
/* This process's nice value, not counting that it is raised. */
int priority_before(void);
/* As everybody else; a session's other processes too. */
void priority_reset(pid_t pid);

/* populate.c: allocating pages for the host to write to */
/* Whether the kernel lets us write where a task itself cannot (FOLL_FORCE). */
bool populate_can_force(void);
/* Why it cannot be done, if so. The answer comes later. */
struct problem populate_start(struct session *session, const struct message *message);
bool populate_owns(pid_t pid);
bool populate_reaped(pid_t pid, int status);
void populate_watch(struct loop *loop);
/* End all workers, and wait until they are gone. */
void populate_end(void);

/* sha256.c */
void hmac_sha256(const uint8_t *key, size_t key_size, const uint8_t *data, size_t size,
		 uint8_t mac[SHA256_SIZE]);

/* proof.c: only who can read this VM's RAM may restore; only root's agent gets a restore */
/* What makes a session's proofs good for it alone. */
struct nonces {
	uint8_t host[TOKEN_SIZE], agent[NONCE_SIZE];
};

bool proof_make(void);
uint64_t proof_address(void);
bool proof_make_nonce(uint8_t nonce[NONCE_SIZE]);
bool proof_of_host(const struct nonces *nonces, const struct mp_value *proof);
void proof_of_agent(const struct nonces *nonces, uint8_t proof[SHA256_SIZE]);

/* warm.c: a CRIU with memory, started in advance */
#define WARM_TABLE "ovr-warm.tab"

void warm_message(struct session *session, const struct message *message);
void warm_session_ended(struct session *session);
bool warm_owns(pid_t pid);
bool warm_reaped(pid_t pid, int status);
void warm_watch(struct loop *loop);
void warm_shutdown(void);
/* Bytes that are ready, and where they are in their process. */
uint64_t warm_size(void);
uint64_t warm_address(void);
/* Give the pool's CRIU its arguments: its pid, or -1 when it cannot be used; it is gone then. */
pid_t warm_take(const struct directory *directory, const struct message *begin,
		const struct criu_command *command);
/* How much of the restore's memory came from the pool, and why not all of it. */
uint64_t warm_served(const char **why);
void warm_forget(void);

/* oom.c: whom the OOM killer takes */
void oom_protect_agent(void);
/* In a child: the score that the agent was started with. */
void oom_as_before(void);
void oom_take_me_first(void);
void oom_hide(pid_t pid);

/* child.c */
struct child_io {
	int in, out, err; /* what becomes its standard descriptors; -1: /dev/null */
};

/*
 * Start a program in a session of its own with a clean signal state.
 * Its pid, or -1 with errno of the failed fork or exec.
 */
pid_t child_start(char *const argv[], char *const env[], struct child_io io);

/* lab.c, lab_run.c */
#ifdef OVR_LAB
#define LAB_BUILD true
bool lab_message(struct session *session, const struct message *message);
void lab_session_ended(struct session *session);
bool lab_reaped(pid_t pid, int status);
bool lab_owns(pid_t pid);
void lab_watch(struct loop *loop);
void lab_work(void);
#else
#define LAB_BUILD false
static inline bool lab_message(struct session *session, const struct message *message)
{
	(void)session, (void)message;
	return false;
}
static inline void lab_session_ended(struct session *session)
{
	(void)session;
}
static inline bool lab_reaped(pid_t pid, int status)
{
	(void)pid, (void)status;
	return false;
}
static inline bool lab_owns(pid_t pid)
{
	(void)pid;
	return false;
}
static inline void lab_watch(struct loop *loop)
{
	(void)loop;
}
static inline void lab_work(void) {}
#endif

#endif
