/* One dump: CRIU saves a running tree but for its memory, which the host reads. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "freeze.h"
#include "restore.h"

/* The images that are sent to the host. */
static struct {
	DIR *files;
	int fd;      /* the present one, or -1 */
	bool single; /* it is the only one */
	char name[NAME_MAX + 1];
} sending = {.fd = -1};

void dump_forget(void)
{
	close_fd(&sending.fd);
	if (sending.files)
		closedir(sending.files);
	sending.files = NULL;
	sending.single = false;
	track_end();
	freeze_forget();
	archive_forget();
	engine_remove_images(&restore.directory);
}

/* Whether CRIU changes more of the tree than it does to stop it, and undoes it only at its end. */
static bool locks(char *const criu_options[])
{
	for (char *const *option = criu_options; *option; option++)
		if (!strcmp(*option, "--tcp-established") ||
		    !strncmp(*option, "--freeze-cgroup", strlen("--freeze-cgroup")))
			return true;
	return false;
}

/* CRIU shuts the network of a tree that has a network namespace of its own (criu/netfilter.c). */
static bool other_network(pid_t pid)
{
	struct stat ours, theirs;
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/ns/net", pid);
	return stat("/proc/self/ns/net", &ours) < 0 || stat(path, &theirs) < 0 ||
	       ours.st_ino != theirs.st_ino;
}

static pid_t start_dump(const struct message *message)
{
	static struct criu_command command;
	pid_t pid = -1;

	if (criu_command_make(&command, &restore.directory, message)) {
		restore.dump_locks = locks(command.strings) ||
				     other_network((pid_t)message_uint(message, KEY_PID));
		pid = criu_start(&command);
	}
	criu_command_free(&command);
	if (pid > 0) {
		priority_raise(pid);
		/* Its death while its parasite is in the tree would damage the tree. */
		oom_hide(pid);
	}
	return pid;
}

static bool good_pid(struct session *session, const struct message *message)
{
	uint64_t pid = message_uint(message, KEY_PID);

	if (pid > 1 && pid <= INT_MAX)
		return true;
	session_break(session, CODE_TASK, "there is no such process to dump");
	return false;
}

/* A dump by the container's engine. Its CRIU is known when it runs the hook. */
static pid_t start_engine(const struct message *message)
{
	/* All engines have CRIU freeze the container's cgroup. */
	restore.dump_locks = true;
	return engine_start_dump(&restore.directory, message);
}

static bool good_container(struct session *session, const struct message *message)
{
	char engine[MAX_STRING], name[MAX_STRING];

	if (!message_has(message, KEY_ENGINE))
		return true;
	message_str(message, KEY_ENGINE, engine);
	name[0] = 0;
	if (message_has(message, KEY_NAME))
		message_str(message, KEY_NAME, name);
	if (engine_known(engine) && name[0] && name[0] != '-')
		return true;
	session_break(session, CODE_ENGINE, "no such engine, or no name of a container");
	return false;
}

static bool is_by_podman(const struct message *message)
{
	char engine[MAX_STRING];

	if (!message_has(message, KEY_ENGINE))
		return false;
	message_str(message, KEY_ENGINE, engine);
	return engine_is_podman(engine);
}

void dump_begin(struct session *session, const struct message *message)
{
	if (!restore_in_phase(session, UPLOADING) || !good_pid(session, message) ||
	    !good_container(session, message))
		return;
	restore.engine = message_has(message, KEY_ENGINE);
	if (!hook_listen() || !(restore.engine || directory_make_dump(&restore.directory))) {
		session_break(session, code_of_errno(errno), "cannot prepare the dump: %s",
			      strerror(errno));
		return;
	}
	restore.dump = true;
	restore.podman = is_by_podman(message);
	restore.dumped = (pid_t)message_uint(message, KEY_PID);
	restore.leave_running = message_uint(message, KEY_LEAVE_RUNNING);
	restore.child = restore.engine ? start_engine(message) : start_dump(message);
	if (restore.child < 0) {
		restore_refuse_start(session, errno);
		return;
	}
	restore_building(message);
}

/* ------------------------------------------------------------------------ soft-dirty bits */

void dump_starts(void)
{
	struct writer writer;

	restore.phase = TRACKING;
	restore.tracking_since = now_ms();
	writer = session_writer(restore.owner, OP_STARTS);
	session_send(restore.owner, &writer);
}

static void begin_tracking(bool look)
{
	if (!track_begin(restore.dumped, look))
		restore_abort(code_of_errno(errno), "no process can be started");
}

static bool may_track(struct session *session, bool look)
{
	if (!restore_in_phase(session, TRACKING))
		return false;
	if (track_under_way() && (look || !track_may_look()))
		session_break(session, CODE_PROTOCOL, "message out of order");
	return restore.phase == TRACKING;
}

void dump_freeze(struct session *session)
{
	if (may_track(session, true))
		begin_tracking(true);
}

void dump_track(struct session *session, const struct message *message)
{
	if (!may_track(session, false))
		return;
	restore.tracked = message_uint(message, KEY_STOP);
	if (track_may_look())
		track_looked();
	else
		begin_tracking(false);
}

void dump_frozen(void)
{
	struct writer writer = session_writer(restore.owner, OP_FROZEN);

	session_send(restore.owner, &writer);
}

void dump_tracked(uint64_t frozen_us)
{
	struct writer writer = session_writer(restore.owner, OP_TRACKED);

	if (restore.tracked) {
		/* What is left of the time that CRIU has */
		if (restore.late_at < LLONG_MAX)
			restore.late_at += now_ms() - restore.tracking_since;
		progress_begin(restore.stall_ms);
		restore.phase = BUILDING;
		hook_say(HOOK_GO);
		close_fd(&restore.hook);
	}
	message_add_uint(&writer, KEY_FROZEN_US, frozen_us);
	session_send(restore.owner, &writer);
}

/* ------------------------------------------------------------------------ images */

static bool is_file(const char *name)
{
	struct stat stat;

	return fstatat(restore.directory.dump, name, &stat, AT_SYMLINK_NOFOLLOW) == 0 &&
	       S_ISREG(stat.st_mode);
}

static bool open_image(const char *name)
{
	sending.fd = openat(restore.directory.dump, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	snprintf(sending.name, sizeof(sending.name), "%s", name);
	return sending.fd >= 0;
}

/* Open the next image. False if there is none, or on an error, which aborts the dump. */
static bool next_image(void)
{
	struct dirent *entry;
	int again;

	if (sending.single)
		return false;
	if (!sending.files) {
		again = openat(restore.directory.dump, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		sending.files = again < 0 ? NULL : fdopendir(again);
		if (!sending.files) {
			close_fd(&again);
			restore_abort(code_of_errno(errno), "cannot list the images");
			return false;
		}
	}
	while (errno = 0, (entry = readdir(sending.files))) {
		/* Not ".", ".." and the link to the parent */
		if (!strncmp(entry->d_name, PAGES, strlen(PAGES)) || !is_file(entry->d_name))
			continue;
		if (open_image(entry->d_name))
			return true;
		break;
	}
	/* A missing image would be noticed only when the tree is restored. */
	if (errno)
		restore_abort(code_of_errno(errno), "cannot read an image");
	return false;
}

void dump_send(const char *name, const uint8_t *data, size_t size)
{
	struct writer writer = session_writer(restore.owner, OP_SAVED);

	message_add_str(&writer, KEY_NAME, name);
	message_add_bin(&writer, KEY_DATA, data, size);
	session_send(restore.owner, &writer);
}

/* Send the next piece of the present image; the last one, which is empty, closes it. */
static void send_piece(void)
{
	static uint8_t data[DUMP_PIECE];
	ssize_t size = read(sending.fd, data, sizeof(data));

	if (size < 0) {
		restore_abort(code_of_errno(errno), "cannot read an image");
		return;
	}
	dump_send(sending.name, data, (size_t)size);
	if (!size)
		close_fd(&sending.fd);
}

void dump_send_images(void)
{
	while (restore.phase == SAVING && session_has_room(restore.owner)) {
		if (sending.fd >= 0 || next_image()) {
			send_piece();
		} else if (restore.phase == SAVING) {
			restore.phase = HELD;
			hook_report_stopped();
		}
	}
}

void dump_fetch(struct session *session, const struct message *message)
{
	char name[MAX_STRING];

	if (!restore_in_phase(session, HELD))
		return;
	message_str(message, KEY_NAME, name);
	if (!restore.dump || strncmp(name, PAGES, strlen(PAGES)) || strchr(name, '/') ||
	    strlen(name) > NAME_MAX || !is_file(name) || !open_image(name)) {
		session_refuse(session, CODE_IMAGES, "there is no such pages image");
		return;
	}
	sending.single = true;
	restore.phase = SAVING;
}

/* ------------------------------------------------------------------------ end */

/* Whether a prepared tree is in its own cgroups, and its CRIU has not ended it unasked. */
static bool undone_whole(void)
{
	if (restore.move_damaged)
		return false;
	/*
	 * Of an earlier agent's CRIU only this is known: if it was still there, it has put back what
	 * it had locked. If not, it may have been killed.
	 */
	if (restore.adopted)
		return restore.criu > 1;
	/* Both hooks were killed: CRIU has ended the tree. */
	return restore.engine || restore.child_status != 0;
}

/* CRIU has put back what it had changed, and no task was ended by it. */
static bool engine_criu_let_go(void)
{
	return engine_criu_gave_up(&restore.theirs) ||
	       (restore.leave_running && engine_criu_succeeded(&restore.theirs));
}

bool dump_is_whole(void)
{
	if (!restore.tracked && !restore.root && !restore.adopted)
		return true; /* CRIU has not stopped it */
	if (restore.move[0] && !undone_whole())
		return false;
	if (restore.adopted)
		return true;
	/* CRIU may hold it no more: it may have been killed. */
	if (restore.container && !tree_task_lives(restore.root))
		return false;
	/* An engine's exit status does not tell how its CRIU has ended. */
	if (restore.engine)
		return engine_criu_let_go();
	/*
	 * Killed between its hooks CRIU may leave parasite code in a task. At the second one it
	 * leaves what it has locked, and after Go a part of the tree.
	 */
	return !WIFSIGNALED(restore.child_status) ||
	       (restore.root > 1 && !restore.dump_locks && !restore.dump_released);
}

bool dump_runs_on(void)
{
	/*
	 * Killed in the middle, CRIU may have ended a part of the tree. A tree that it has ended
	 * may take a moment to die.
	 */
	return tree_task_lives(restore.root) && engine_criu_let_go();
}

void dump_report_stats(struct session *session)
{
	static uint8_t stats[4096];
	struct writer writer = session_writer(session, OP_DUMPED);
	char path[300];
	ssize_t size;
	int fd;

	snprintf(path, sizeof(path), "%s/stats-dump", restore.directory.path);
	/* That of an adopted move is gone with its agent. */
	fd = restore.adopted ? -1 : open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
	size = fd < 0 ? 0 : read(fd, stats, sizeof(stats));
	close_fd(&fd);
	message_add_bin(&writer, KEY_STATS, stats, size > 0 ? (size_t)size : 0);
	session_send(session, &writer);
}

void dump_report_success(void)
{
	if (restore.owner)
		dump_report_stats(restore.owner);
	restore_forget();
}
