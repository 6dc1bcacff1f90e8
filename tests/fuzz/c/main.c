/*
 * The entry point where libFuzzer is not: runs the inputs in the files that
 * are named, and `rounds` inputs made of them by chance, the same each time.
 */
#include "fuzz.h"

#define LONGEST (1 << 16)

static uint64_t chance = 0x9e3779b97f4a7c15;

static uint64_t draw(uint64_t limit)
{
	chance ^= chance << 13;
	chance ^= chance >> 7;
	chance ^= chance << 17;
	return chance % limit;
}

static size_t load(const char *path, uint8_t data[LONGEST])
{
	FILE *file = fopen(path, "re");
	size_t size;

	CHECK(file);
	size = fread(data, 1, LONGEST, file);
	fclose(file);
	return size;
}

static size_t damage(uint8_t *data, size_t size)
{
	size_t at, count;

	for (uint64_t times = 1 + draw(4); size && times--;) {
		at = draw(size);
		count = 1 + draw(size - at < 16 ? size - at : 16);
		switch (draw(4)) {
		case 0: data[at] = (uint8_t)draw(256); break;
		case 1:
			memmove(data + at, data + at + count, size - at - count);
			size -= count;
			break;
		case 2: memset(data + at, draw(2) ? 0xff : 0, count); break;
		default: memmove(data + at, data + draw(size - count + 1), count);
		}
	}
	return size;
}

int main(int argc, char **argv)
{
	static uint8_t data[LONGEST];
	long rounds = argc > 1 ? strtol(argv[1], NULL, 10) : 0;

	CHECK(argc > 2);
	for (int i = 2; i < argc; i++)
		LLVMFuzzerTestOneInput(data, load(argv[i], data));
	for (long i = 0; i < rounds; i++) {
		size_t size = load(argv[2 + draw((uint64_t)argc - 2)], data);

		LLVMFuzzerTestOneInput(data, damage(data, size));
	}
	return 0;
}
