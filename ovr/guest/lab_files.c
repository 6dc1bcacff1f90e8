/* Files that the host of a lab VM sends and receives. */
#ifdef OVR_LAB
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lab.h"

void lab_put(struct session *session, struct job *job, const struct message *message)
{
	mode_t mode = (mode_t)(message_uint(message, KEY_MODE) & 07777);
	char path[MAX_STRING];
	struct stat stat;
	int fd;

	message_str(message, KEY_PATH, path);
	/* Replace the file, not its content: it may be a running program. */
	if (lstat(path, &stat) == 0 && S_ISREG(stat.st_mode))
		unlink(path);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || fchmod(fd, mode) < 0) {
		lab_refuse(session, path);
		close_fd(&fd);
		return;
	}
	*job = (struct job){.what = PUT, .session = session, .in = fd, .out = -1, .err = -1};
}

void lab_add_data(struct session *session, struct job *job, const struct message *message)
{
	const struct mp_value *data = &message->field[KEY_DATA];
	struct writer writer;
	uint32_t done = 0;
	ssize_t size = 0;

	/* Data sent before the host received the error. */
	if (job->what != PUT)
		return;
	while (done < data->size &&
	       (size = write(job->in, data->data + done, data->size - done)) > 0)
		done += (uint32_t)size;
	job->size += done;
	if (done < data->size) {
		lab_refuse(session, "write");
		lab_end_job(job);
	} else if (!data->size) {
		writer = session_writer(session, OP_STORED);
		message_add_uint(&writer, KEY_SIZE, job->size);
		session_send(session, &writer);
		lab_end_job(job);
	}
}

void lab_get(struct session *session, struct job *job, const struct message *message)
{
	char path[MAX_STRING];
	int fd;

	message_str(message, KEY_PATH, path);
	fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0) {
		lab_refuse(session, path);
		return;
	}
	*job = (struct job){.what = GET, .session = session, .in = -1, .out = fd, .err = -1};
}

void lab_send_file(struct job *job)
{
	struct session *session = job->session;
	struct writer writer;

	while (lab_may_send(session)) {
		uint8_t piece[PIECE];
		ssize_t size = read(job->out, piece, sizeof(piece));

		if (size > 0) {
			lab_send_data(session, OP_DATA, 0, piece, (size_t)size);
			job->size += (uint64_t)size;
			continue;
		}
		if (size < 0) {
			lab_refuse(session, "read");
		} else {
			writer = session_writer(session, OP_END);
			message_add_uint(&writer, KEY_SIZE, job->size);
			session_send(session, &writer);
		}
		lab_end_job(job);
		return;
	}
}
#endif
