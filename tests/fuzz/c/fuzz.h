/* Shared by the fuzz targets of the agent. */
#ifndef OVR_FUZZ_H
#define OVR_FUZZ_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"

#define CHECK(condition)                                                                           \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__,           \
				#condition);                                                       \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

/* The input, taken piece by piece; zeros when it is used up. */
struct input {
	const uint8_t *at, *end;
};

static inline bool input_left(const struct input *input) { return input->at < input->end; }

static inline uint8_t input_byte(struct input *input)
{
	return input_left(input) ? *input->at++ : 0;
}

static inline uint64_t input_number(struct input *input, unsigned bytes)
{
	uint64_t number = 0;

	while (bytes--)
		number = number << 8 | input_byte(input);
	return number;
}

/* At most `size` bytes, as many as there are. */
static inline size_t input_bytes(struct input *input, const uint8_t **data, size_t size)
{
	size_t left = (size_t)(input->end - input->at);

	if (size > left)
		size = left;
	*data = input->at;
	input->at += size;
	return size;
}

/* use.c: read all that a parsed message holds, by all accessors */
void use_message(const struct message *message);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
