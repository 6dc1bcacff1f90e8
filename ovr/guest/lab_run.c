/* Programs run by the host of a lab VM: their input, output and exit. */
#ifdef OVR_LAB
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lab.h"

#define MAX_CHILDREN 1024
#define PIPE_SIZE (1 << 20)

static pid_t children[MAX_CHILDREN];

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

static char *default_env[] = {
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/root",
	"LANG=C.UTF-8",
	NULL,
};

static pid_t start(const struct message *message, struct child_io io)
{
	char **argv = message_strings(message, KEY_ARGV);
	char **env =
		message_has(message, KEY_ENV) ? message_strings(message, KEY_ENV) : default_env;
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

void lab_run(struct session *session, struct job *job, const struct message *message)
{
	int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
	uint64_t timeout = message_uint(message, KEY_TIMEOUT_MS);
	pid_t pid = -1;

	if (open_pipes(in, out, err))
		pid = start(message, (struct child_io){in[0], out[1], err[1]});
	if (pid < 0)
		lab_refuse(session, "cannot run the program");
	close_fd(&in[0]);
	close_fd(&out[1]);
	close_fd(&err[1]);
	*job = (struct job){
		.what = RUN,
		.session = session,
		.pid = pid,
		.in = in[1],
		.out = out[0],
		.err = err[0],
		.deadline = now_ms() + (int64_t)(timeout >> 1 > INT32_MAX ? INT32_MAX : timeout),
	};
	if (pid < 0)
		lab_end_job(job);
}

void lab_spawn(struct session *session, const struct message *message)
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
		lab_refuse(session, "cannot start the program");
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

void lab_add_input(struct session *session, struct job *job, const struct message *message)
{
	const struct mp_value *data = &message->field[KEY_DATA];

	/* Input for a command that has just exited is not an error. */
	if (job->what != RUN)
		return;
	if (job->input) {
		session_break(session, CODE_PROTOCOL, "more input before the last was written");
	} else if (!data->size) {
		close_fd(&job->in);
	} else if (job->in < 0) {
		say_taken(session);
	} else {
		job->input = malloc(data->size);
		if (!job->input) {
			session_break(session, CODE_NO_MEMORY, "out of memory");
			return;
		}
		memcpy(job->input, data->data, data->size);
		job->input_at = 0;
		job->input_size = data->size;
	}
}

static void feed(struct job *job)
{
	ssize_t size = write(job->in, job->input + job->input_at, job->input_size - job->input_at);

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

/* Send one chunk of output; true if more may be available. */
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
		lab_send_data(job->session, OP_OUTPUT, stream, piece, (size_t)size);
	return size > 0;
}

static void finish_run(struct job *job)
{
	struct writer writer;

	/* Drain the pipes without waiting for EOF: the command's children may keep them open. */
	while (lab_may_send(job->session))
		if (!pass_output(job, &job->out, 1) && !pass_output(job, &job->err, 2))
			break;
	if (!lab_may_send(job->session))
		return;
	writer = session_writer(job->session, OP_EXITED);
	message_add_uint(&writer, KEY_STATUS,
			 (uint64_t)(WIFSIGNALED(job->status) ? 128 + WTERMSIG(job->status) :
							       WEXITSTATUS(job->status)));
	message_add_bool(&writer, KEY_TIMED_OUT, job->timed_out);
	session_send(job->session, &writer);
	lab_end_job(job);
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

/* ------------------------------------------------------------------------ the loop */

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
	else if (fd == job->out && lab_may_send(job->session))
		pass_output(job, &job->out, 1);
	else if (fd == job->err && lab_may_send(job->session))
		pass_output(job, &job->err, 2);
}

void lab_run_work(struct job *job)
{
	if (job->exited) {
		finish_run(job);
	} else if (!job->timed_out && now_ms() >= job->deadline) {
		job->timed_out = true;
		kill(-job->pid, SIGKILL);
	}
}

void lab_run_watch(struct loop *loop, struct job *job)
{
	if (!job->timed_out)
		loop_wake_at(loop, job->deadline);
	if (job->in >= 0)
		loop_watch(loop, job->in, job->input ? POLLOUT : 0, on_job, job);
	if (!lab_may_send(job->session))
		return;
	if (job->out >= 0)
		loop_watch(loop, job->out, POLLIN, on_job, job);
	if (job->err >= 0)
		loop_watch(loop, job->err, POLLIN, on_job, job);
}
#endif
