/* The private directory of one restore: DIR/restore-XXXXXX with the images in images/. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

static void empty(int parent, const char *name)
{
	int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	DIR *files = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;

	if (!files) {
		if (fd >= 0)
			close(fd);
		return;
	}
	while ((entry = readdir(files)))
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
			unlinkat(fd, entry->d_name, 0);
	closedir(files);
}

static void remove_parent(int images)
{
	empty(images, "parent");
	unlinkat(images, "parent", AT_REMOVEDIR);
}

static void remove_tree(const char *path, bool keep_log)
{
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	int images = openat(fd, "images", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

	if (images >= 0) {
		remove_parent(images);
		close(images);
	}
	if (fd < 0)
		return;
	empty(fd, "images");
	unlinkat(fd, "images", AT_REMOVEDIR);
	if (!keep_log)
		empty(fd, ".");
	close(fd);
	rmdir(path);
}

static void remove_leftovers(void)
{
	DIR *base = opendir(options.dir);
	struct dirent *entry;
	char path[512];

	while (base && (entry = readdir(base)))
		if (!strncmp(entry->d_name, "restore-", 8)) {
			snprintf(path, sizeof(path), "%s/%s", options.dir, entry->d_name);
			remove_tree(path, false);
		}
	if (base)
		closedir(base);
}

bool directory_prepare_base(void)
{
	char path[256];
	struct stat stat;
	int lock;

	snprintf(path, sizeof(path), "%s/lock", options.dir);
	if (mkdir(options.dir, 0700) < 0 && errno != EEXIST) {
		complain("%s: %s", options.dir, strerror(errno));
		return false;
	}
	if (lstat(options.dir, &stat) < 0 || !S_ISDIR(stat.st_mode) ||
	    stat.st_uid != geteuid() || chmod(options.dir, 0700) < 0) {
		complain("%s is not a directory of ours", options.dir);
		return false;
	}
	/* Held until we end: two agents would remove each other's directories. */
	lock = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB) < 0) {
		complain("another agent uses %s", options.dir);
		return false;
	}
	remove_leftovers();
	return true;
}

const char *directory_make(struct directory *directory)
{
	char images[300];

	*directory = (struct directory){.images = -1};
	snprintf(directory->path, sizeof(directory->path), "%s/restore-XXXXXX", options.dir);
	if (!mkdtemp(directory->path)) {
		directory->path[0] = 0;
		return strerror(errno);
	}
	snprintf(images, sizeof(images), "%s/images", directory->path);
	if (mkdir(images, 0700) == 0)
		directory->images = open(images, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	return directory->images < 0 ? strerror(errno) : NULL;
}

static bool plain_name(const struct mp_value *name)
{
	return name->size >= 1 && name->size <= 255 && !memchr(name->data, '/', name->size) &&
	       !memchr(name->data, 0, name->size) && name->data[0] != '.';
}

static int open_image(struct directory *directory, const char *name)
{
	const int flags = O_WRONLY | O_APPEND | O_NOFOLLOW | O_CLOEXEC;
	int fd = openat(directory->images, name, flags | O_CREAT | O_EXCL, 0600);

	if (fd >= 0)
		directory->files++;
	else if (errno == EEXIST)
		fd = openat(directory->images, name, flags);
	return fd;
}

const char *directory_append(struct directory *directory, const struct mp_value *name,
			     const struct mp_value *data)
{
	char text[256];
	uint32_t done = 0;
	ssize_t size = 0;
	int fd;

	if (!plain_name(name))
		return "not a plain file name";
	if (directory->files >= MAX_FILES || data->size > MAX_IMAGE_BYTES - directory->bytes)
		return "too many or too large image files";
	memcpy(text, name->data, name->size);
	text[name->size] = 0;
	fd = open_image(directory, text);
	if (fd < 0)
		return strerror(errno);
	while (done < data->size && (size = write(fd, data->data + done, data->size - done)) > 0)
		done += (uint32_t)size;
	directory->bytes += done;
	close(fd);
	return done == data->size ? NULL : strerror(errno);
}

bool directory_make_parent(const struct directory *directory, char **names)
{
	char path[MAX_STRING + 16];
	bool good = names && mkdirat(directory->images, "parent", 0700) == 0;

	for (char **name = names; good && *name; name++) {
		snprintf(path, sizeof(path), "parent/%s", *name);
		good = !strchr(*name, '/') &&
		       linkat(directory->images, *name, directory->images, path, 0) == 0;
	}
	return good;
}

void directory_remove_parent(const struct directory *directory)
{
	remove_parent(directory->images);
}

void directory_remove(struct directory *directory, bool keep_log)
{
	if (directory->images >= 0)
		close(directory->images);
	if (directory->path[0])
		remove_tree(directory->path, keep_log);
	*directory = (struct directory){.images = -1};
}
