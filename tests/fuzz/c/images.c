/*
 * Names and contents of image files: whatever they are, files appear in the
 * restore's own directory only, with the content that was sent, within limits.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"

#define MOST 32

struct options options;

static struct {
	char name[256];
	size_t size;
} wanted[MOST];

void complain(const char *format, ...)
{
	(void)format;
	abort();
}

/* No disk is full here, and what the host is told is another target's affair. */
enum code code_of_errno(int error)
{
	CHECK(error);
	return CODE_SYSTEM;
}

static void set_up(void)
{
	static char base[300];
	const char *temporary = getenv("TMPDIR");

	if (options.dir)
		return;
	snprintf(base, sizeof(base), "%s/agent-XXXXXX", temporary ? temporary : "/tmp");
	CHECK(mkdtemp(base));
	options.dir = base;
	CHECK(directory_prepare_base());
}

/* How many entries a directory has; each must be a directory or not, as `directories` says. */
static unsigned entries(const char *path, bool directories, const char *besides)
{
	DIR *dir = opendir(path);
	struct dirent *entry;
	unsigned count = 0;

	CHECK(dir && dirfd(dir) >= 0);
	while ((entry = readdir(dir))) {
		struct stat stat;

		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..") ||
		    (besides && !strcmp(entry->d_name, besides)))
			continue;
		CHECK(!fstatat(dirfd(dir), entry->d_name, &stat, AT_SYMLINK_NOFOLLOW));
		CHECK(directories ? S_ISDIR(stat.st_mode) : S_ISREG(stat.st_mode));
		count++;
	}
	closedir(dir);
	return count;
}

static void remember(const struct mp_value *name, size_t size)
{
	char text[256] = "";
	size_t i = 0;

	CHECK(name->size < sizeof(text));
	memcpy(text, name->data, name->size);
	CHECK(strlen(text) == name->size && text[0] != '.' && !strchr(text, '/'));
	while (i < MOST && wanted[i].name[0] && strcmp(wanted[i].name, text))
		i++;
	CHECK(i < MOST);
	memcpy(wanted[i].name, text, sizeof(text));
	wanted[i].size += size;
}

static void check_files(const struct directory *directory)
{
	char images[300];
	struct stat stat;
	unsigned count = 0;
	uint64_t bytes = 0;

	snprintf(images, sizeof(images), "%s/images", directory->path);
	for (size_t i = 0; i < MOST && wanted[i].name[0]; i++, count++) {
		CHECK(!fstatat(directory->images, wanted[i].name, &stat, AT_SYMLINK_NOFOLLOW));
		CHECK((size_t)stat.st_size == wanted[i].size);
		bytes += wanted[i].size;
	}
	CHECK(entries(images, false, NULL) == count && directory->files == count);
	CHECK(directory->bytes == bytes && bytes <= MAX_IMAGE_BYTES && count <= MAX_FILES);
	CHECK(entries(directory->path, true, NULL) == 1);
	CHECK(entries(options.dir, true, "lock") == 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, data + size};
	struct directory directory;

	set_up();
	memset(wanted, 0, sizeof(wanted));
	CHECK(!directory_make(&directory).text);
	while (input_left(&input)) {
		struct mp_value name = {.type = MP_STR}, content = {.type = MP_BIN};
		size_t length = input_byte(&input);

		/* The first step beyond what a file name may have. */
		name.size = (uint32_t)input_bytes(&input, &name.data, length == 255 ? 300 : length);
		length = input_number(&input, 2);
		content.size = (uint32_t)input_bytes(&input, &content.data, length);
		if (!directory_append(&directory, &name, &content).text)
			remember(&name, content.size);
	}
	check_files(&directory);
	directory_remove(&directory, false);
	CHECK(entries(options.dir, true, "lock") == 0);
	return 0;
}
