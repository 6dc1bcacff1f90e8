/*
 * Send CRIU's default configuration files, so that the host can warn about ignored options.
 *
 * CRIU reads /etc/criu/default.conf and $HOME/.criu/default.conf (next_config()
 * in criu/config.c) unless run with --no-default-config, as criu_command_make() does.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

struct config {
	char path[MAX_STRING];
	ssize_t size; /* 0: empty or missing */
	char text[MAX_CONFIG];
};

/* Only regular files: reading any other kind may block or never end. */
static void read_config(struct config *config)
{
	int fd = open(config->path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
	struct stat status;

	config->size = 0;
	if (fd < 0)
		return;
	if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode))
		config->size = read(fd, config->text, sizeof(config->text));
	close(fd);
}

void config_message(struct session *session)
{
	static struct config configs[CONFIG_FILES];
	struct writer writer = session_writer(session, OP_CONFIGURED);
	const char *home = getenv("HOME");
	uint32_t count = 0;

	snprintf(configs[0].path, MAX_STRING, "/etc/criu/default.conf");
	/* systemd starts system services without HOME. */
	snprintf(configs[1].path, MAX_STRING, "%s/.criu/default.conf", home ? home : "/root");
	for (int i = 0; i < CONFIG_FILES; i++) {
		read_config(&configs[i]);
		count += configs[i].size > 0;
	}
	message_add_list(&writer, KEY_NAMES, count);
	for (int i = 0; i < CONFIG_FILES; i++)
		if (configs[i].size > 0)
			message_item_str(&writer, configs[i].path);
	message_add_list(&writer, KEY_DATA, count);
	for (int i = 0; i < CONFIG_FILES; i++)
		if (configs[i].size > 0)
			message_item_bin(&writer, configs[i].text, (size_t)configs[i].size);
	session_send(session, &writer);
}
