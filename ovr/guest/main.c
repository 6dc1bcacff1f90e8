#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

#define MAX_DIR 80
#define LAST_PRIVILEGED_PORT 1023 /* LAST_RESERVED_PORT in net/vmw_vsock/af_vsock.c */

struct options options = {.dir = "/run/ovr", .criu = "criu"};

static void usage(void)
{
	fprintf(stderr,
		"usage: ovr-agent [--vsock-port N] [--serial NAME] [--dir DIR] [--criu PROGRAM]\n"
		"Serves ovr on the host of this VM; --vsock-port %d --serial org.ovr.0 is usual.\n",
		VSOCK_PORT);
	exit(2);
}

static void parse(int argc, char **argv)
{
	static const struct option known[] = {
		{"vsock-port", required_argument, NULL, 'v'},
		{"serial", required_argument, NULL, 's'},
		{"dir", required_argument, NULL, 'd'},
		{"criu", required_argument, NULL, 'c'},
#ifdef OVR_LAB
		{"unix", required_argument, NULL, 'u'},
		{"unix-serial", required_argument, NULL, 'U'},
#endif
		{NULL, 0, NULL, 0},
	};
	int option;

	while ((option = getopt_long(argc, argv, "", known, NULL)) != -1)
		switch (option) {
		case 'v':
			options.vsock_port = (unsigned)strtoul(optarg, NULL, 10);
			break;
		case 's':
			options.serial = optarg;
			break;
		case 'd':
			options.dir = optarg;
			break;
		case 'c':
			options.criu = optarg;
			break;
#ifdef OVR_LAB
		case 'u':
			options.unix_path = optarg;
			break;
		case 'U':
			options.unix_serial = optarg;
			break;
#endif
		default:
			usage();
		}
	/* The hook's socket is below it, and sun_path is short. */
	if (optind != argc || options.dir[0] != '/' || strlen(options.dir) > MAX_DIR)
		usage();
}

int main(int argc, char **argv)
{
	static struct loop loop;
	const char *action = getenv("CRTOOLS_SCRIPT_ACTION");

	/* CRIU runs its action script without arguments; the environment identifies it. */
	if (action && getenv(HOOK_SOCKET))
		return hook_main(action);
	if (wrapper_is_meant(argv[0]))
		return wrapper_main(argv);
	parse(argc, argv);
	if (options.vsock_port > LAST_PRIVILEGED_PORT)
		complain("port %u is not privileged: any user of this guest can serve it while the"
			 " agent is not running",
			 options.vsock_port);
	if (!proof_make()) {
		complain("cannot create the page of the secret: %s", strerror(errno));
		return 1;
	}
	if (!criu_know_program()) {
		complain("cannot find the agent's own program file: %s", strerror(errno));
		return 1;
	}
	if (!directory_prepare_base())
		return 1;
	oom_protect_agent();
	loop_run(&loop);
	return 0;
}
