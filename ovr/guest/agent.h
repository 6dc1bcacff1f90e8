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

#include "message.h"

#define AGENT_VERSION "0.1.0"
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

/* A host that sends only a hello occupies a slot: more than one, so that it blocks no other. */
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
	struct pollfd fds[10 + 5 * MAX_SESSIONS];
	callback calls[10 + 5 * MAX_SESSIONS];
	void *contexts[10 + 5 * MAX_SESSIONS];
	int count;
	int64_t deadline; /* ms, or -1 */
};

int64_t now_us(void);
int64_t now_ms(void);
void loop_watch(struct loop *loop, int fd, short events, callback call, void *context);
void loop_wake_at(struct loop *loop, int64_t deadline);
void loop_run(struct loop *loop);
void complain(const char *format, ...) __attribute__((format(printf, 1, 2)));
void reap_children(void);
void sleep_ms(int ms);

/* The reason for a failure; success if `text` is NULL. */
struct problem {
	enum code code;
	const char *text;
};

const char *code_name(enum code code);
/* The error code that reports an errno to the host. */
enum code code_of_errno(int error);

/* session.c */
struct session;

enum link {
	LINK_STREAM, /* a connection is a session */
	LINK_SERIAL, /* consecutive sessions on one connection, each begins with a sync */
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
/* Whether input of the host has arrived that is not read yet. */
bool session_has_input(const struct session *session);
void session_watch(struct loop *loop);
/* Do all work that does not block; sessions are closed only here. */
void session_work(void);

/* transport.c */
void transport_watch(struct loop *loop);
/* The serial port itself is gone. */
void transport_port_lost(void);
/* A descriptor that becomes readable when the host reopens the port. */
int transport_port_waiter(void);
bool transport_port_connected(int fd);

/* restore.c */
void restore_message(struct session *session, const struct message *message);
void restore_session_ended(struct session *session);
void restore_session_heard(struct session *session);
bool restore_reaped(pid_t pid, int status);
void restore_watch(struct loop *loop);
/* Handle deadlines and the exit of CRIU. */
void restore_work(void);
/* Output is flushed: drop the raised priority if no restore is under way. */
void restore_rest(void);
/* The agent was asked to terminate. Called in every turn of the loop from then on. */
void restore_shutdown(void);
/* Whether a dump's CRIU, which releases the tree, is worth waiting for before the agent exits. */
bool restore_lingers(void);

/* images.c: the private directory of a restore */
struct directory {
	char path[256]; /* empty: no directory */
	int images;     /* descriptor of path/images */
	int dump;       /* descriptor of path/dump, or -1 */
	unsigned files;
	uint64_t bytes;
};

bool directory_prepare_base(void);
struct problem directory_make(struct directory *directory);
struct problem directory_append(struct directory *directory, const struct mp_value *name,
				const struct mp_value *data);
/* Make images/parent with hard links to these images, as an incremental dump has it. */
bool directory_make_parent(const struct directory *directory, char **names);
void directory_remove_parent(const struct directory *directory);
/* Make path/dump, which CRIU dumps into. */
bool directory_make_dump(struct directory *directory);
/* Make path/path, which wrapper.c describes, with links to two programs: this one, and CRIU. */
bool directory_make_wrapper(struct directory *directory, const char *self, const char *criu);
void directory_remove(struct directory *directory, bool keep_log);
/* Remove the files in the directory `name`, all or those chosen. */
void directory_empty(int parent, const char *name, bool (*chosen)(const char *file));

#define AGENT_PATH "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define AGENT_DIRECTORIES (&AGENT_PATH[sizeof("PATH=") - 1])

/* criu.c */
/* Record this program's path. Call it at start, before an upgrade can replace the file. */
bool criu_know_program(void);

/* How CRIU is started by a Begin or Dump; pointers lead into it and into `strings`. */
struct criu_command {
	char images[300], level[16], output[300], socket[300], pid[16];
	char *env[3], **argv, **strings;
};

/* False and errno on failure. Free the command in either case. */
bool criu_command_make(struct criu_command *command, const struct directory *directory,
		       const struct message *begin);
void criu_command_free(struct criu_command *command);
/* CRIU's pid, or -1 and errno. */
pid_t criu_start(const struct criu_command *command);
#define LOG_LINES 16
#define LOG_WIDTH 256
int criu_log_errors(const struct directory *directory, char lines[LOG_LINES][LOG_WIDTH]);
/* Append the last lines of a file that contain `word` to `count` others. Returns the new count. */
int log_collect(int fd, const char *word, char lines[LOG_LINES][LOG_WIDTH], int count);
/* The path of this program, which CRIU starts as its action script. NULL and errno on failure. */
const char *criu_program(void);
const char *criu_version(void);

/* engine.c: container engines and runtimes, which start CRIU themselves */
#define ENGINE_OUT "engine.out"
#define ENGINE_FIFO "archive" /* podman writes a container's archive into it */
#define ENGINE_ERR "engine.err"

#define CONTAINER_ID 64 /* hexadecimal digits in the id of a container of podman's */

/* The engine's CRIU. Descriptors are -1 until the hook has reported it. */
struct engine_criu {
	int end; /* pidfd */
	int log;
	pid_t runtime;                    /* parent of CRIU and of the restored tree */
	char container[CONTAINER_ID + 1]; /* podman's container id; empty: not known */
};

bool engine_known(const char *name);
bool engine_is_podman(const char *name);
void engine_add_installed(struct writer *writer);
/* Find a program in the directories of the agent's PATH. False if there is none. */
bool engine_find_program(const char *program, char path[512]);

/* The engine's pid, or -1 and errno. */
pid_t engine_start(const struct directory *directory, const struct message *begin);
struct engine_criu engine_adopt(pid_t criu, const char *log);
/*
 * Start one step of the cleanup after a failed restore, in a child. Returns its pid, 0 if the step
 * has nothing to do, -1 after the last step.
 */
pid_t engine_clean_up(int step, const struct engine_criu *criu);
/* Have podman remove a container, whatever is in it; its stderr is given. As engine_start(). */
pid_t engine_start_removal(const char *container, int messages_fd);
bool engine_criu_ended(const struct engine_criu *criu);
void engine_forget(struct engine_criu *criu);
void engine_forget_names(void);
void engine_result(const struct directory *directory, char line[LOG_WIDTH]);
int engine_log_errors(const struct directory *directory, const struct engine_criu *criu,
		      char lines[LOG_LINES][LOG_WIDTH]);

/* engine_dump.c: dumps of containers */
/* Start the engine's checkpoint; its pid, or -1 and errno. */
pid_t engine_start_dump(struct directory *directory, const struct message *message);
/* Open the directory that the engine's CRIU writes its images to. False if that is another one. */
bool engine_open_images(struct directory *directory, pid_t criu);
/* CRIU has given up and let the tree run on, or was never there. */
bool engine_criu_gave_up(const struct engine_criu *criu);
/* CRIU has dumped the tree, and ended it unless it was to run on. */
bool engine_criu_succeeded(const struct engine_criu *criu);

/* wrapper.c: this program in the place of CRIU, where an engine looks for it */
#define WRAPPER_DIRECTORY "path"
#define WRAPPER_NAME "criu"
#define WRAPPER_REAL "real"
#define WRAPPER_CONFIG "criu.conf"
bool wrapper_is_meant(const char *name);
int wrapper_main(char **argv);

/* find.c: the root process of a container */
void find_message(struct session *session, const struct message *message);
void find_session_ended(struct session *session);
bool find_reaped(pid_t pid, int status);
bool find_owns(pid_t pid);
void find_watch(struct loop *loop);
void find_work(void);

/* config.c: CRIU's default configuration files */
void config_message(struct session *session);

/* hook.c */
#define HOOK_SOCKET "OVR_HOOK_SOCKET"
#define HOOK_GO 'g' /* the agent's answer: continue */

struct hook_report {
	int32_t root, criu; /* root 0: another action than pre-resume and post-dump */
};

int hook_main(const char *action);

/* tree.c: finding and killing trees */
#define MAX_TREE MAX_LIST

struct tree {
	pid_t criu, root; /* 0: none, or gone */
	bool orphans;     /* unknown children of the agent are members too */
	pid_t runtime;    /* its children are members too; 0: none */
	pid_t engine;     /* starts CRIU; 0: none */
};

bool tree_stop_criu(pid_t criu);
/* Kill and wait until no task lives; CRIU must be stopped or gone. */
bool tree_kill(struct tree tree);
/* Ids of the threads that CRIU traces; -1 when there are too many. */
int tree_traced(pid_t criu, uint32_t ids[MAX_TREE]);
/* Clear the soft-dirty bits of a running tree. */
void tree_clear_refs(pid_t root);
/* Set the nice value of a tree's zombies. */
void tree_renice_zombies(struct tree tree, int nice);
/* The tracer of a task, or 0. */
pid_t tree_tracer(pid_t pid);
/* The parent of a task, or 0. */
pid_t tree_parent(pid_t pid);
/* Whether `pid` is `ancestor` or descends from it. */
bool tree_descends(pid_t pid, pid_t ancestor);
/* Whether a process exists that has not ended. */
bool tree_task_lives(pid_t pid);

/* exitkill.c */
/* Set PTRACE_O_EXITKILL on all tracees of CRIU, which is stopped. NULL, or an error message. */
const char *exitkill_set(pid_t criu);

/* One process of a Touch: how its pages are touched, and the number of its ranges. */
struct portion {
	uint64_t pid, how, count;
};

static inline bool read_portion(struct mp_reader *reader, struct portion *portion)
{
	struct mp_value pid, how, count;

	if (!mp_read(reader, &pid) || !mp_read(reader, &how) || !mp_read(reader, &count))
		return false;
	*portion = (struct portion){pid.number, how.number, count.number};
	return true;
}

/* touch.c */
/*
 * Allocate pages of held tasks as requested by a Touch; 0, or an errno.
 * Only for a child that exits afterwards.
 */
int touch_portions(struct mp_reader portions, struct mp_reader ranges);
/*
 * Write a byte regardless of the area's protection, so that the kernel gives the
 * task a page of its own. Without `keep` the page is not read first: reading a
 * page of a file would map its neighbours as well.
 */
bool touch_forced(int mem, uint64_t at, bool keep);

/* priority.c: priority over other processes while a restore is under way */
/* Raise the nice values of a process (0: this one) and of its session. Failure only costs time. */
void priority_raise(pid_t pid);
/* Give a process (0: this one) real-time priority. Only for one that creates no restored tasks. */
void priority_real_time(pid_t pid);
/* In a child before exec: restore the scheduling attributes from before priority_raise(). */
void priority_of_child(void);
/* This process's nice value from before priority_raise(). */
int priority_before(void);
/* Undo priority_raise(), and reset the nice value of the process's session. */
void priority_reset(pid_t pid);

/* populate.c: allocating pages for the host to write to */
/* Whether /proc/PID/mem can write to areas that the task itself cannot write to (FOLL_FORCE). */
bool populate_can_force(void);
/* Start a Touch or Map; returns a problem, or none if the answer follows later. */
struct problem populate_start(struct session *session, const struct message *message);
bool populate_owns(pid_t pid);
bool populate_reaped(pid_t pid, int status);
void populate_watch(struct loop *loop);
/* Kill all workers and wait until they are reaped. */
void populate_end(void);

/* sha256.c */
void hmac_sha256(const uint8_t *key, size_t key_size, const uint8_t *data, size_t size,
		 uint8_t mac[SHA256_SIZE]);

/* proof.c: host and agent authenticate each other before a restore */
/* Bind both proofs to one session. */
struct nonces {
	uint8_t host[TOKEN_SIZE], agent[NONCE_SIZE];
};

bool proof_make(void);
uint64_t proof_address(void);
bool proof_make_nonce(uint8_t nonce[NONCE_SIZE]);
bool proof_of_host(const struct nonces *nonces, const struct mp_value *proof);
void proof_of_agent(const struct nonces *nonces, uint8_t proof[SHA256_SIZE]);

/* warm.c: the pool, a CRIU started in advance with allocated memory */
#define WARM_TABLE "ovr-warm.tab"

void warm_message(struct session *session, const struct message *message);
void warm_session_ended(struct session *session);
bool warm_owns(pid_t pid);
bool warm_reaped(pid_t pid, int status);
void warm_watch(struct loop *loop);
void warm_shutdown(void);
/* The pool's size in bytes and its address in its process; 0 if no pool is ready. */
uint64_t warm_size(void);
uint64_t warm_address(void);
/* Start the restore in the pool's CRIU. Returns its pid, or -1 if no pool could be used. */
pid_t warm_take(const struct directory *directory, const struct message *begin,
		const struct criu_command *command);
/* Bytes of the restore's memory served by the pool, and the reason if it is not all of them. */
uint64_t warm_served(const char **why);
void warm_forget(void);

/* oom.c: OOM scores */
void oom_protect_agent(void);
/* In a child: restore the score that the agent was started with. */
void oom_as_before(void);
void oom_take_me_first(void);
void oom_hide(pid_t pid);

/* child.c */
struct child_io {
	int in, out, err; /* standard descriptors of the child; -1: /dev/null */
};

/*
 * Start a program in a session of its own with a clean signal state.
 * Its pid, or -1 with errno of the failed fork or exec.
 */
pid_t child_start(char *const argv[], char *const env[], struct child_io io);
/* The same; it is killed when the agent dies. */
pid_t child_start_mortal(char *const argv[], char *const env[], struct child_io io);

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
