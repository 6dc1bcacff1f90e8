/* Use the pool (warm.c) for a restore: send its CRIU the arguments and the table of areas. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "warm.h"

/* The state of the pool that the current restore uses. */
static struct pool_state *used;

struct request {
	struct pool_request head;
	char text[POOL_REQUEST];
	bool overflow;
};

static void add(struct request *request, const char *text)
{
	size_t size = strlen(text) + 1;

	if (size > sizeof(request->text) - request->head.size) {
		request->overflow = true;
		return;
	}
	memcpy(request->text + request->head.size, text, size);
	request->head.size += (uint32_t)size;
}

static bool send_all(const void *data, size_t size)
{
	const char *at = data;
	ssize_t done;

	for (; size; at += done, size -= (size_t)done) {
		done = send(pool.socket, at, size, MSG_NOSIGNAL);
		if (done <= 0)
			return false;
	}
	return true;
}

static bool ask(const struct criu_command *command)
{
	static struct request request;
	char path[400];

	request.head = (struct pool_request){0};
	request.overflow = false;
	add(&request, command->output);
	snprintf(path, sizeof(path), "%s/" WARM_TABLE, command->images);
	add(&request, path);
	for (char *const *text = command->argv; *text; text++, request.head.arguments++)
		add(&request, *text);
	for (; request.head.arguments < POOL_ARGUMENTS; request.head.arguments++)
		add(&request, POOL_PADDING);
	for (char *const *text = command->env; *text; text++, request.head.variables++)
		add(&request, *text);
	return !request.overflow && request.head.arguments <= POOL_ARGUMENTS &&
	       send_all(&request.head, sizeof(request.head)) &&
	       send_all(request.text, request.head.size);
}

/*
 * If the images have a parent, CRIU maps areas with mmap() of libc, which the
 * library interposes. The parent's pagemaps are not read.
 */
static bool hand_over(const struct directory *directory, const struct message *begin,
		      const struct criu_command *command)
{
	char **names = message_strings(begin, KEY_WARM_IMAGES);
	bool good = directory_make_parent(directory, names) && ask(command);

	if (!good)
		directory_remove_parent(directory);
	free(names);
	return good;
}

pid_t warm_take(const struct directory *directory, const struct message *begin,
		const struct criu_command *command)
{
	pid_t pid = pool.pid;

	if (pool.stage != READY)
		return -1;
	/* The process may have just died. */
	reap_children();
	if (pool.stage != READY)
		return -1;
	if (!hand_over(directory, begin, command)) {
		pool_end("it did not accept the request");
		return -1;
	}
	used = pool.state;
	pool.state = NULL;
	snprintf(pool.note, sizeof(pool.note), "it was used by a restore");
	pool_forget();
	return pid;
}

uint64_t warm_served(const char **why)
{
	static char text[120];

	*why = "";
	if (!used) {
		*why = pool.note;
		return 0;
	}
	if (used->error) {
		snprintf(text, sizeof(text), "it could not %.39s: %s", used->step,
			 strerror((int)used->error));
		*why = text;
	}
	return used->served;
}

void warm_forget(void)
{
	pool_unmap(&used);
}
