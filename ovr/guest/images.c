/*
 * The private directory of one restore or dump: DIR/restore-XXXXXX with the host's images
 * in images/, and CRIU's in dump/.
 *
 * CRIU also opens images from inside the tree's user namespace, as another user
 * without capabilities over these files: images/, its parent/ and the images are
 * accessible to all users. DIR and DIR/restore-XXXXXX are private; CRIU does not
 * look them up, since it has images/ open.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "move.h"

#define PREFIX "restore-"
#define QUOTE(words) #words
#define TEXT(number) QUOTE(number)

#define PRIVATE_DIRECTORY 0700
#define IMAGES_DIRECTORY 0711
#define PARENT_DIRECTORY 0755 /* CRIU opens it with O_RDONLY: open_parent() in criu/page-xfer.c */
#define IMAGE 0644

/* Descriptor of options.dir, which only root can write to. */
static int base = -1;

void directory_empty(int parent, const char *name, bool (*chosen)(const char *file))
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
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") &&
		    (!chosen || chosen(entry->d_name)))
			unlinkat(fd, entry->d_name, 0);
	closedir(files);
}

static void remove_parent(int images)
{
	directory_empty(images, "parent", NULL);
	unlinkat(images, "parent", AT_REMOVEDIR);
}

static void remove_tree(const char *name, bool keep_log)
{
	int fd = openat(base, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	int images;

	if (fd < 0)
		return;
	images = openat(fd, "images", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (images >= 0) {
		remove_parent(images);
		close(images);
	}
	directory_empty(fd, "images", NULL);
	unlinkat(fd, "images", AT_REMOVEDIR);
	directory_empty(fd, "dump", NULL);
	unlinkat(fd, "dump", AT_REMOVEDIR);
	directory_empty(fd, WRAPPER_DIRECTORY, NULL);
	unlinkat(fd, WRAPPER_DIRECTORY, AT_REMOVEDIR);
	unlinkat(fd, ENGINE_FIFO, 0);
	if (!keep_log)
		directory_empty(fd, ".", NULL);
	close(fd);
	unlinkat(base, name, AT_REMOVEDIR);
}

static void remove_leftovers(void)
{
	int fd = openat(base, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *entries = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;

	while (entries && (entry = readdir(entries)))
		if (!strncmp(entry->d_name, PREFIX, strlen(PREFIX)))
			remove_tree(entry->d_name, false);
	if (entries)
		closedir(entries);
}

bool directory_prepare_base(void)
{
	struct stat stat;
	int lock;

	if (mkdir(options.dir, PRIVATE_DIRECTORY) < 0 && errno != EEXIST) {
		complain("%s: %s", options.dir, strerror(errno));
		return false;
	}
	base = open(options.dir, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (base < 0 || fstat(base, &stat) < 0 || stat.st_uid != geteuid() ||
	    fchmod(base, PRIVATE_DIRECTORY) < 0) {
		complain("%s cannot be used as a private directory", options.dir);
		return false;
	}
	/* Held until exit: two agents would remove each other's directories. */
	lock = openat(base, "lock", O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB) < 0) {
		complain("another agent uses %s", options.dir);
		return false;
	}
	remove_leftovers();
	return true;
}

/* The problem of the last failed call. Names the directory: its file system may be full. */
static struct problem failure(void)
{
	static char text[400];
	enum code code = code_of_errno(errno);

	snprintf(text, sizeof(text), "%s: %s", options.dir, strerror(errno));
	return (struct problem){code == CODE_SYSTEM ? CODE_IMAGES : code, text};
}

/* Create a directory with a unique name, like mkdtemp(), but relative to a descriptor. */
static bool make_restore(char name[32])
{
	uint32_t chance;

	for (int i = 0; i < 100; i++) {
		if (getrandom(&chance, sizeof(chance), 0) != (ssize_t)sizeof(chance))
			return false;
		snprintf(name, 32, PREFIX "%08x", chance);
		if (mkdirat(base, name, PRIVATE_DIRECTORY) == 0)
			return true;
		if (errno != EEXIST)
			return false;
	}
	return false;
}

/* Create a directory with this mode regardless of the umask. A descriptor, or -1 and errno. */
static int make_directory(int parent, const char *name, mode_t mode)
{
	int fd;

	if (mkdirat(parent, name, mode) < 0)
		return -1;
	fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	if (fd >= 0 && fchmod(fd, mode) < 0)
		close_fd(&fd);
	return fd;
}

struct problem directory_make(struct directory *directory)
{
	char name[32], images[64];

	*directory = (struct directory){.images = -1, .dump = -1};
	if (!make_restore(name))
		return failure();
	snprintf(directory->path, sizeof(directory->path), "%s/%s", options.dir, name);
	snprintf(images, sizeof(images), "%s/images", name);
	directory->images = make_directory(base, images, IMAGES_DIRECTORY);
	return directory->images < 0 ? failure() : (struct problem){.text = NULL};
}

static bool plain_name(const struct mp_value *name)
{
	return name->size >= 1 && name->size <= 255 && !memchr(name->data, '/', name->size) &&
	       !memchr(name->data, 0, name->size) && name->data[0] != '.';
}

static int open_image(struct directory *directory, const char *name)
{
	const int flags = O_WRONLY | O_APPEND | O_NOFOLLOW | O_CLOEXEC;
	int fd = openat(directory->images, name, flags), error;

	if (fd >= 0 || errno != ENOENT)
		return fd;
	if (directory->files >= MAX_FILES) {
		errno = EMFILE;
		return -1;
	}
	fd = openat(directory->images, name, flags | O_CREAT | O_EXCL, IMAGE);
	directory->files += fd >= 0;
	if (fd >= 0 && fchmod(fd, IMAGE) < 0) {
		error = errno;
		close_fd(&fd);
		errno = error;
	}
	return fd;
}

static struct problem refusal(const char *text)
{
	return (struct problem){CODE_IMAGES, text};
}

struct problem directory_append(struct directory *directory, const struct mp_value *name,
				const struct mp_value *data)
{
	struct problem problem;
	char text[256];
	uint32_t done = 0;
	ssize_t size = 0;
	int fd;

	if (!plain_name(name))
		return refusal("not a plain file name");
	if (data->size > MAX_IMAGE_BYTES - directory->bytes)
		return refusal("more than " TEXT(MAX_IMAGE_BYTES) " bytes in all");
	memcpy(text, name->data, name->size);
	text[name->size] = 0;
	fd = open_image(directory, text);
	if (fd < 0)
		return errno == EMFILE ? refusal("more than " TEXT(MAX_FILES) " files") : failure();
	while (done < data->size && (size = write(fd, data->data + done, data->size - done)) > 0)
		done += (uint32_t)size;
	directory->bytes += done;
	problem = done == data->size ? (struct problem){.text = NULL} : failure();
	close(fd);
	return problem;
}

bool directory_make_parent(const struct directory *directory, char **names)
{
	char path[MAX_STRING + 16];
	int parent = names ? make_directory(directory->images, "parent", PARENT_DIRECTORY) : -1;
	bool good = parent >= 0;

	close_fd(&parent);
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

bool directory_make_dump(struct directory *directory)
{
	char name[64];

	snprintf(name, sizeof(name), "%s/dump", strrchr(directory->path, '/') + 1);
	directory->dump = make_directory(base, name, IMAGES_DIRECTORY);
	return directory->dump >= 0;
}

int directory_open_moves(void)
{
	if (mkdirat(base, "moved", PRIVATE_DIRECTORY) < 0 && errno != EEXIST)
		return -1;
	return openat(base, "moved", O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

bool directory_make_wrapper(struct directory *directory, const char *self, const char *criu)
{
	char name[64];
	int fd;
	bool done;

	snprintf(name, sizeof(name), "%s/" WRAPPER_DIRECTORY, strrchr(directory->path, '/') + 1);
	fd = make_directory(base, name, PRIVATE_DIRECTORY);
	done = fd >= 0 && symlinkat(self, fd, WRAPPER_NAME) == 0 &&
	       symlinkat(criu, fd, WRAPPER_REAL) == 0;
	close_fd(&fd);
	return done;
}

void directory_remove(struct directory *directory, bool keep_log)
{
	close_fd(&directory->images);
	close_fd(&directory->dump);
	if (directory->path[0])
		remove_tree(strrchr(directory->path, '/') + 1, keep_log);
	*directory = (struct directory){.images = -1, .dump = -1};
}
