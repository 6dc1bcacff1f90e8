/* What only lab builds do: run commands, move files. One job a session at a time. */
#ifdef OVR_LAB
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

#define MAX_CHILDREN 1024
#define PIPE_SIZE (1 << 20)

enum what { NOTHING, RUN, PUT, GET };

static struct job {
	enum what what;
	struct session *session;
	pid_t pid;
	bool exited, timed_out;
	int status;
	int64_t deadline;
	int in, out, err;	/* RUN: pipes; PUT, GET: the file is in or out */
	uint8_t *input;		/* a piece of standard input on its way */
	size_t input_at, input_size;
	uint64_t size;
} jobs[MAX_SESSIONS];

static pid_t children[MAX_CHILDREN];

/* By session: what is under way to the host. */
static size_t under_way[MAX_SESSIONS];

static bool may_send(const struct session *session)
{
	return session_has_room(session) && under_way[session_index(session)] < WINDOW;
}

static pid_t *child_slot(pid_t pid)
{
	for (size_t i = 0; i < MAX_CHILDREN; i++)
		if (children[i] == pid)
			return &children[i];
	return NULL;
}

bool lab_owns(pid_t pid)
{
	return child_slot(pid) != NULL;
}

static void end_job(struct job *job)
{
	close_fd(&job->in);
	close_fd(&job->out);
	close_fd(&job->err);
	free(job->input);
	*job = (struct job){.in = -1, .out = -1, .err = -1};
}

void lab_session_ended(struct session *session)
{
	struct job *job = &jobs[session_index(session)];

	under_way[session_index(session)] = 0;
	if (job->what == NOTHING)
		return;
	if (job->what == RUN && !job->exited)
		kill(-job->pid, SIGKILL);
	end_job(job);
}

static void refuse(struct session *session, const char *what)
{
	session_refuse(session, "%s: %s", what, strerror(errno));
}

/* ------------------------------------------------------------------------ commands */

static char *default_env[] = {
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/root", "LANG=C.UTF-8", NULL,
};

static pid_t start(const struct message *message, struct child_io io)
{
	char **argv = message_strings(message, KEY_ARGV);
	char **env = message_has(message, KEY_ENV) ? message_strings(message, KEY_ENV) :
						      default_env;
	pid_t *slot = child_slot(0), pid = -1;

	errno = slot ? EINVAL : EAGAIN;
	if (argv && env && argv[0] && slot)
		pid = child_start(argv, env, io);
	if (pid > 0)
		*slot = pid;
	if (env != default_env)
		free(env);
	free(argv);
	return pid;
}

static bool open_pipes(int in[2], int out[2], int err[2])
{
	int *pipes[] = {in, out, err};

	for (int i = 0; i < 3; i++)
		if (pipe2(pipes[i], O_CLOEXEC) < 0)
			return false;
	fcntl(in[1], F_SETFL, O_NONBLOCK);
	fcntl(out[0], F_SETFL, O_NONBLOCK);
	fcntl(err[0], F_SETFL, O_NONBLOCK);
	fcntl(out[0], F_SETPIPE_SZ, PIPE_SIZE);
	fcntl(in[0], F_SETPIPE_SZ, PIPE_SIZE);
	return true;
}

static void run(struct session *session, struct job *job, const struct message *message)
{
	int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
	uint64_t timeout = message_uint(message, KEY_TIMEOUT_MS);
	pid_t pid = -1;

	if (open_pipes(in, out, err))
		pid = start(message, (struct child_io){in[0], out[1], err[1]});
	if (pid < 0)
		refuse(session, "cannot run it");
	close_fd(&in[0]);
	close_fd(&out[1]);
	close_fd(&err[1]);
	*job = (struct job){
		.what = RUN, .session = session, .pid = pid, .in = in[1], .out = out[0],
		.err = err[0], .deadline = now_ms() + (int64_t)(timeout >> 1 > INT32_MAX ?
								 INT32_MAX : timeout),
	};
	if (pid < 0)
		end_job(job);
}

static void spawn(struct session *session, const struct message *message)
{
	struct child_io io = {-1, -1, -1};
	struct writer writer;
	char path[MAX_STRING];
	pid_t pid = -1;

	if (message_has(message, KEY_OUTPUT)) {
		message_str(message, KEY_OUTPUT, path);
		io.out = io.err = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	}
	if (!message_has(message, KEY_OUTPUT) || io.out >= 0)
		pid = start(message, io);
	if (pid < 0)
		refuse(session, "cannot start it");
	close_fd(&io.out);
	if (pid < 0)
		return;
	writer = session_writer(session, OP_SPAWNED);
	message_add_uint(&writer, KEY_PID, (uint64_t)pid);
	session_send(session, &writer);
}

static void say_taken(struct session *session)
{
	struct writer writer = session_writer(session, OP_TAKEN);

	session_send(session, &writer);
}

static void add_input(struct session *session, struct job *job, const struct message *message)
{
	const struct mp_value *data = &message->field[KEY_DATA];

	/* Late input of a command that has ended is nobody's mistake. */
	if (job->what != RUN)
		return;
	if (job->input) {
		session_break(session, "more input before the last was taken");
	} else if (!data->size) {
		close_fd(&job->in);
	} else if (job->in < 0) {
		say_taken(session);
	} else {
		job->input = malloc(data->size);
		if (!job->input) {
			session_break(session, "out of memory");
			return;
		}
		memcpy(job->input, data->data, data->size);
		job->input_at = 0;
		job->input_size = data->size;
	}
}

static void feed(struct job *job)
{
	ssize_t size = write(job->in, job->input + job->input_at,
			     job->input_size - job->input_at);

	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (size < 0)
		close_fd(&job->in);
	else
		job->input_at += (size_t)size;
	if (size >= 0 && job->input_at < job->input_size)
		return;
	free(job->input);
	job->input = NULL;
	say_taken(job->session);
}

static void send_data(struct session *session, enum op op, int stream, const uint8_t *data,
		      size_t size)
{
	struct writer writer = session_writer(session, op);

	if (op == OP_OUTPUT)
		message_add_uint(&writer, KEY_STREAM, (uint64_t)stream);
	message_add_bin(&writer, KEY_DATA, data, size);
	session_send(session, &writer);
	under_way[session_index(session)] += size + FRAME_COST;
}

static void add_credit(struct session *session, const struct message *message)
{
	size_t *size = &under_way[session_index(session)];
	uint64_t credit = message_uint(message, KEY_SIZE);

	*size = credit < *size ? *size - (size_t)credit : 0;
}

/* One piece of output; true when there may be more right now. */
static bool pass_output(struct job *job, int *fd, int stream)
{
	uint8_t piece[PIECE];
	ssize_t size;

	if (*fd < 0)
		return false;
	size = read(*fd, piece, sizeof(piece));
	if (size < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (size <= 0)
		close_fd(fd);
	else
		send_data(job->session, OP_OUTPUT, stream, piece, (size_t)size);
	return size > 0;
}

static void finish_run(struct job *job)
{
	struct writer writer;

	/* What it wrote before its end is in the pipes; its own children may keep them open. */
	while (may_send(job->session))
		if (!pass_output(job, &job->out, 1) && !pass_output(job, &job->err, 2))
			break;
	if (!may_send(job->session))
		return;
	writer = session_writer(job->session, OP_EXITED);
	message_add_uint(&writer, KEY_STATUS, (uint64_t)(WIFSIGNALED(job->status) ?
			 128 + WTERMSIG(job->status) : WEXITSTATUS(job->status)));
	message_add_bool(&writer, KEY_TIMED_OUT, job->timed_out);
	session_send(job->session, &writer);
	end_job(job);
}

bool lab_reaped(pid_t pid, int status)
{
	pid_t *slot = child_slot(pid);

	if (!slot)
		return false;
	*slot = 0;
	for (size_t i = 0; i < MAX_SESSIONS; i++)
		if (jobs[i].what == RUN && jobs[i].pid == pid) {
			jobs[i].exited = true;
			jobs[i].status = status;
		}
	return true;
}

/* ------------------------------------------------------------------------ files */

static void put(struct session *session, struct job *job, const struct message *message)
{
	mode_t mode = (mode_t)(message_uint(message, KEY_MODE) & 07777);
	char path[MAX_STRING];
	struct stat stat;
	int fd;

	message_str(message, KEY_PATH, path);
	/* A new file rather than new content: the old one may be a program that runs. */
	if (lstat(path, &stat) == 0 && S_ISREG(stat.st_mode))
		unlink(path);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || fchmod(fd, mode) < 0) {
		refuse(session, path);
		close_fd(&fd);
		return;
	}
	*job = (struct job){.what = PUT, .session = session, .in = fd, .out = -1, .err = -1};
}

static void add_data(struct session *session, struct job *job, const struct message *message)
{
	const struct mp_value *data = &message->field[KEY_DATA];
	struct writer writer;
	uint32_t done = 0;
	ssize_t size = 0;

	/* Data that was already on its way when the file was refused. */
	if (job->what != PUT)
		return;
	while (done < data->size &&
	       (size = write(job->in, data->data + done, data->size - done)) > 0)
		done += (uint32_t)size;
	job->size += done;
	if (done < data->size) {
		refuse(session, "write");
		end_job(job);
	} else if (!data->size) {
		writer = session_writer(session, OP_STORED);
		message_add_uint(&writer, KEY_SIZE, job->size);
		session_send(session, &writer);
		end_job(job);
	}
}

static void get(struct session *session, struct job *job, const struct message *message)
{
	char path[MAX_STRING];
	int fd;

	message_str(message, KEY_PATH, path);
	fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0) {
		refuse(session, path);
		return;
	}
	*job = (struct job){.what = GET, .session = session, .in = -1, .out = fd, .err = -1};
}

static void send_file(struct job *job)
{
	struct session *session = job->session;
	struct writer writer;

	while (may_send(session)) {
		uint8_t piece[PIECE];
		ssize_t size = read(job->out, piece, sizeof(piece));

		if (size > 0) {
			send_data(session, OP_DATA, 0, piece, (size_t)size);
			job->size += (uint64_t)size;
			continue;
		}
		if (size < 0) {
			refuse(session, "read");
		} else {
			writer = session_writer(session, OP_END);
			message_add_uint(&writer, KEY_SIZE, job->size);
			session_send(session, &writer);
		}
		end_job(job);
		return;
	}
}

/* ------------------------------------------------------------------------ the loop */

bool lab_message(struct session *session, const struct message *message)
{
	struct job *job = &jobs[session_index(session)];

	switch (message->op) {
	case OP_STDIN:
		add_input(session, job, message);
		return true;
	case OP_DATA:
		add_data(session, job, message);
		return true;
	case OP_CREDIT:
		add_credit(session, message);
		return true;
	case OP_RUN: case OP_PUT: case OP_GET: case OP_SPAWN:
		break;
	default:
		return false;
	}
	if (job->what != NOTHING)
		session_break(session, "one thing at a time");
	else if (message->op == OP_RUN)
		run(session, job, message);
	else if (message->op == OP_PUT)
		put(session, job, message);
	else if (message->op == OP_GET)
		get(session, job, message);
	else
		spawn(session, message);
	return true;
}

static void on_job(int fd, short events, void *context)
{
	struct job *job = context;

	(void)events;
	if (job->what != RUN)
		return;
	if (fd == job->in && job->input)
		feed(job);
	else if (fd == job->in)
		close_fd(&job->in);
	else if (fd == job->out && may_send(job->session))
		pass_output(job, &job->out, 1);
	else if (fd == job->err && may_send(job->session))
		pass_output(job, &job->err, 2);
}

void lab_work(void)
{
	for (size_t i = 0; i < MAX_SESSIONS; i++) {
		struct job *job = &jobs[i];

		if (job->what == GET)
			send_file(job);
		else if (job->what == RUN && job->exited)
			finish_run(job);
		else if (job->what == RUN && !job->timed_out && now_ms() >= job->deadline) {
			job->timed_out = true;
			kill(-job->pid, SIGKILL);
		}
	}
}

void lab_watch(struct loop *loop)
{
	for (size_t i = 0; i < MAX_SESSIONS; i++) {
		struct job *job = &jobs[i];

		/* Its output went out at once: there is more to do before anything happens. */
		if ((job->what == GET || job->exited) && may_send(job->session))
			loop_wake_at(loop, now_ms());
		if (job->what != RUN || job->exited)
			continue;
		if (!job->timed_out)
			loop_wake_at(loop, job->deadline);
		if (job->in >= 0)
			loop_watch(loop, job->in, job->input ? POLLOUT : 0, on_job, job);
		if (!may_send(job->session))
			continue;
		if (job->out >= 0)
			loop_watch(loop, job->out, POLLIN, on_job, job);
		if (job->err >= 0)
			loop_watch(loop, job->err, POLLIN, on_job, job);
	}
}
#endif
