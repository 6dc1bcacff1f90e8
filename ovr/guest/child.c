/* Start programs. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "agent.h"

static int or_null(int fd)
{
	return fd < 0 ? open("/dev/null", O_RDWR | O_CLOEXEC) : fd;
}

static void become(char *const argv[], char *const env[], struct child_io io, bool mortal)
{
	int from[3] = {io.in, io.out, io.err};
	sigset_t none;

	oom_as_before();
	priority_of_child();
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	if (mortal && prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		return;
	for (int i = 0; i < 3; i++) {
		int fd = or_null(from[i]);

		if (fd < 0 || dup2(fd, i) < 0)
			return;
	}
	execvpe(argv[0], argv, env);
}

/* The child's end of this pipe is closed by a successful exec, else it carries the errno. */
static int exec_error(int pipe_end)
{
	int error = 0;
	ssize_t size;

	do
		size = read(pipe_end, &error, sizeof(error));
	while (size < 0 && errno == EINTR);
	return size == (ssize_t)sizeof(error) ? error : 0;
}

static pid_t start(char *const argv[], char *const env[], struct child_io io, bool mortal)
{
	int news[2], error;
	pid_t pid;

	if (pipe2(news, O_CLOEXEC) < 0)
		return -1;
	pid = fork();
	if (pid == 0) {
		become(argv, env, io, mortal);
		error = errno;
		_exit(write(news[1], &error, sizeof(error)) < 0 ? 126 : 127);
	}
	error = pid < 0 ? errno : 0;
	close(news[1]);
	if (pid > 0)
		error = exec_error(news[0]);
	close(news[0]);
	errno = error;
	return error ? -1 : pid;
}

pid_t child_start(char *const argv[], char *const env[], struct child_io io)
{
	return start(argv, env, io, false);
}

pid_t child_start_mortal(char *const argv[], char *const env[], struct child_io io)
{
	return start(argv, env, io, true);
}
