/*
 * This program, started by an engine in the place of CRIU.
 *
 * At a checkpoint podman hands down nothing of its environment but PATH and XDG_RUNTIME_DIR. So the
 * first directory of the PATH that the agent gives it is DIR/restore-XXXXXX/path, in which "criu"
 * is a link to this program, "real" one to the CRIU that the agent was configured with, and
 * "criu.conf" CRIU's configuration of this dump.
 *
 * Nothing else is run: a PATH that begins with another directory is refused. Nor can this program
 * run itself for ever, since the real CRIU gets a PATH without that directory. It has no more
 * rights than its caller, and needs a directory of the caller's own.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

#define FAILED 127

bool wrapper_is_meant(const char *name)
{
	const char *slash = name ? strrchr(name, '/') : NULL;

	return name && !strcmp(slash ? slash + 1 : name, WRAPPER_NAME);
}

static bool is_private(int directory)
{
	struct stat stat;

	return fstat(directory, &stat) == 0 && stat.st_uid == geteuid() && !(stat.st_mode & 077);
}

static bool is_this_program(int directory, const char *name)
{
	struct stat here, named;

	return stat("/proc/self/exe", &here) == 0 && fstatat(directory, name, &named, 0) == 0 &&
	       here.st_dev == named.st_dev && here.st_ino == named.st_ino;
}

/* Take the first directory out of PATH. False if there is none. */
static bool take_first(char first[256])
{
	const char *path = getenv("PATH");
	size_t size = path ? strcspn(path, ":") : 0;

	if (!size || size >= 256 || path[0] != '/')
		return false;
	snprintf(first, 256, "%.*s", (int)size, path);
	return setenv("PATH", path[size] ? path + size + 1 : AGENT_DIRECTORIES, 1) == 0;
}

/* The directory that holds `path`, in place. */
static bool cut_last(char *path)
{
	char *slash = strrchr(path, '/');

	if (!slash || strcmp(slash + 1, WRAPPER_DIRECTORY) != 0)
		return false;
	*slash = 0;
	return true;
}

static bool set_environment(const char *dump)
{
	char socket[300], config[300];

	snprintf(socket, sizeof(socket), "%s/hook", dump);
	snprintf(config, sizeof(config), "%s/" WRAPPER_DIRECTORY "/" WRAPPER_CONFIG, dump);
	return setenv(HOOK_SOCKET, socket, 1) == 0 && setenv("CRIU_CONFIG_FILE", config, 1) == 0;
}

int wrapper_main(char **argv)
{
	char path[256], real[512];
	ssize_t size = -1;
	int directory =
		take_first(path) ? open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;

	if (directory >= 0 && is_private(directory) && is_this_program(directory, WRAPPER_NAME) &&
	    !is_this_program(directory, WRAPPER_REAL))
		size = readlinkat(directory, WRAPPER_REAL, real, sizeof(real) - 1);
	if (size <= 0 || real[0] != '/' || !cut_last(path)) {
		complain("not started by an engine that the agent runs");
		return FAILED;
	}
	real[size] = 0;
	if (set_environment(path))
		execve(real, argv, environ);
	complain("%s: %s", real, strerror(errno));
	return FAILED;
}
