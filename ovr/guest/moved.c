/*
 * A record of the moved trees that this guest has let run: one empty file each, in a directory of
 * the agent's that outlives the agent, but not the guest.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "move.h"

static bool older(const struct timespec *left, const struct timespec *right)
{
	if (left->tv_sec != right->tv_sec)
		return left->tv_sec < right->tv_sec;
	return left->tv_nsec < right->tv_nsec;
}

/* Remove the oldest but `newest` if there are too many. */
static bool remove_oldest(int moves, const char *newest)
{
	struct timespec least = {0};
	char oldest[MOVE_ID + 1] = "";
	int again = openat(moves, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), count = 0;
	DIR *files = again < 0 ? NULL : fdopendir(again);
	struct dirent *entry;
	struct stat stat;

	if (!files)
		close_fd(&again);
	while (files && (entry = readdir(files))) {
		if (strlen(entry->d_name) != MOVE_ID ||
		    fstatat(moves, entry->d_name, &stat, AT_SYMLINK_NOFOLLOW) < 0)
			continue;
		count++;
		if (!strcmp(entry->d_name, newest) || (oldest[0] && !older(&stat.st_mtim, &least)))
			continue;
		memcpy(oldest, entry->d_name, sizeof(oldest));
		least = stat.st_mtim;
	}
	if (files)
		closedir(files);
	return count > MOVES_KEPT && unlinkat(moves, oldest, 0) == 0;
}

bool moved_mark(const char *move)
{
	int moves = directory_open_moves(), fd, error;

	fd = moves < 0 ? -1 : openat(moves, move, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	error = errno;
	while (fd >= 0 && remove_oldest(moves, move))
		;
	close_fd(&moves);
	errno = error;
	if (fd < 0)
		return false;
	close(fd);
	return true;
}

void moved_unmark(const char *move)
{
	int moves = directory_open_moves();

	if (moves >= 0)
		unlinkat(moves, move, 0);
	close_fd(&moves);
}

bool moved_is_marked(const char *move)
{
	int moves = directory_open_moves();
	bool marked = moves >= 0 && faccessat(moves, move, F_OK, AT_SYMLINK_NOFOLLOW) == 0;

	close_fd(&moves);
	return marked;
}
