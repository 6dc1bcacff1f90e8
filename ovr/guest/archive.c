/*
 * The archive of a dumped container: podman writes it to a FIFO, and it goes to the host piece by
 * piece, so that it needs no space in the guest.
 *
 * podman has ended the container by then, or it is moved. If the host is gone the archive is read
 * all the same, or podman would wait for ever.
 */
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "restore.h"

static int fifo = -1;

bool archive_open(const char *path)
{
	fifo = open(path, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC);
	return fifo >= 0;
}

void archive_forget(void)
{
	close_fd(&fifo);
}

static bool host_takes_more(void)
{
	return !restore.owner || session_has_room(restore.owner);
}

static bool is_wanted(void)
{
	return restore.owner && (restore.phase == RELEASED || restore.phase == PACKING);
}

/* Read and send the next piece. False if there is none now. */
static bool pass_on(void)
{
	static uint8_t data[DUMP_PIECE];
	ssize_t size = read(fifo, data, sizeof(data));

	if (size < 0 && errno == EINTR)
		return true;
	if (size > 0 && is_wanted())
		dump_send(ENGINE_ARCHIVE, data, (size_t)size);
	/* No writer: before podman opens it, too, but then nobody asks. */
	if (size == 0 || (size < 0 && errno != EAGAIN))
		close_fd(&fifo);
	return size > 0;
}

static void on_data(int fd, short events, void *context)
{
	(void)events, (void)context;
	if (fd == fifo && host_takes_more())
		pass_on();
}

bool archive_is_sent(void)
{
	while (fifo >= 0 && host_takes_more() && pass_on())
		;
	return fifo < 0;
}

bool archive_is_awaited(void)
{
	return fifo >= 0 && is_wanted();
}

void archive_host_is_silent(void)
{
	/* A prepared move can be adopted; so the host is told, if it is there after all. */
	if (restore.phase == PACKING)
		session_break(restore.owner, CODE_SILENT, "the host was silent for too long");
	else
		restore.owner = NULL;
}

void archive_watch(struct loop *loop)
{
	if (fifo >= 0 && host_takes_more())
		loop_watch(loop, fifo, POLLIN, on_data, NULL);
}
