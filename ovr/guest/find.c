/*
 * Find a container's root process: ask its engine, one request at a time.
 *
 * The engine's answer is sent to the host as it is, which reads the JSON in it.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

#define PATIENCE_MS 120000
#define MAX_ANSWER (64 << 10)

static const char podman_format[] = "{\"id\":{{json .ID}},\"state\":{{json .State}}}";

static struct {
	pid_t child; /* 0: none */
	struct session *owner;
	int out, err; /* memfds */
	int64_t late_at;
} finding = {.out = -1, .err = -1};

static void forget(void)
{
	close_fd(&finding.out);
	close_fd(&finding.err);
	finding.child = 0;
	finding.owner = NULL;
}

static void start(const char *program, const char *name)
{
	const char *const podman[] = {program,       "container", "inspect", "--format",
				      podman_format, "--",        name,      NULL};
	const char *const runtime[] = {program, "state", name, NULL};
	char *argv[ARRAY_SIZE(podman)], *env[] = {AGENT_PATH, "HOME=/root", "LC_ALL=C.UTF-8", NULL};
	const char *const *words = engine_is_podman(program) ? podman : runtime;
	int count = 0;

	do
		argv[count] = (char *)(uintptr_t)words[count];
	while (words[count++]);
	finding.out = memfd_create("found", MFD_CLOEXEC);
	finding.err = memfd_create("messages", MFD_CLOEXEC);
	if (finding.out >= 0 && finding.err >= 0)
		finding.child =
			child_start(argv, env, (struct child_io){-1, finding.out, finding.err});
}

void find_message(struct session *session, const struct message *message)
{
	char program[MAX_STRING], name[MAX_STRING];

	message_str(message, KEY_ENGINE, program);
	message_str(message, KEY_NAME, name);
	if (finding.child > 0) {
		session_refuse(session, CODE_BUSY, "busy: another session looks for a container");
		return;
	}
	if (!engine_known(program) || !name[0] || name[0] == '-') {
		session_refuse(session, CODE_ENGINE, "no such engine, or no name of a container");
		return;
	}
	start(program, name);
	if (finding.child <= 0) {
		session_refuse(session, CODE_START, "%s cannot be started: %s", program,
			       strerror(errno));
		forget();
		return;
	}
	finding.owner = session;
	finding.late_at = now_ms() + PATIENCE_MS;
}

static void answer(int status)
{
	static uint8_t data[MAX_ANSWER];
	char lines[LOG_LINES][LOG_WIDTH];
	ssize_t size = pread(finding.out, data, sizeof(data), 0);
	int count = log_collect(finding.err, "", lines, 0);
	struct writer writer = session_writer(finding.owner, OP_FOUND);

	message_add_uint(
		&writer, KEY_STATUS,
		(uint64_t)(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status)));
	message_add_bin(&writer, KEY_DATA, data, size > 0 ? (size_t)size : 0);
	message_add_str(&writer, KEY_TEXT, count ? lines[count - 1] : "");
	session_send(finding.owner, &writer);
}

bool find_reaped(pid_t pid, int status)
{
	if (finding.child <= 0 || pid != finding.child)
		return false;
	if (finding.owner)
		answer(status);
	forget();
	return true;
}

bool find_owns(pid_t pid)
{
	return finding.child > 0 && pid == finding.child;
}

void find_session_ended(struct session *session)
{
	if (finding.owner != session)
		return;
	finding.owner = NULL;
	if (finding.child > 0)
		kill(finding.child, SIGKILL);
}

void find_work(void)
{
	if (finding.child > 0 && now_ms() >= finding.late_at)
		kill(finding.child, SIGKILL);
}

void find_watch(struct loop *loop)
{
	if (finding.child > 0 && now_ms() < finding.late_at)
		loop_wake_at(loop, finding.late_at);
}
