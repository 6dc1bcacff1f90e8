/*
 * Messages of the protocol as the agent sees them.
 */
#ifndef OVR_MESSAGE_H
#define OVR_MESSAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "msgpack.h"
#include "protocol.h"

/* message.c: the schema of protocol.py and lab_protocol.py, decoded and encoded */
struct message {
	enum op op;
	uint64_t present; /* bit KEY_x: the field is present */
	struct mp_value field[KEY_COUNT];
};

const char *message_parse(struct message *message, const uint8_t *body, size_t size);
bool message_has(const struct message *message, enum key key);
uint64_t message_uint(const struct message *message, enum key key);
void message_str(const struct message *message, enum key key, char text[MAX_STRING]);
/* An array of strings, NULL-terminated like argv; free() it once. NULL if memory is short. */
char **message_strings(const struct message *message, enum key key);
/* A reader of an array field's elements. */
struct mp_reader message_list(const struct message *message, enum key key, uint32_t *count);

struct writer {
	uint8_t *start, *at, *end;
	unsigned fields;
	bool overflow;
};

void message_open(struct writer *writer, uint8_t *buffer, size_t size, enum op op);
void message_add_uint(struct writer *writer, enum key key, uint64_t number);
void message_add_bool(struct writer *writer, enum key key, bool value);
void message_add_str(struct writer *writer, enum key key, const char *text);
void message_add_bin(struct writer *writer, enum key key, const void *data, size_t size);
void message_add_list(struct writer *writer, enum key key, uint32_t count);
void message_item_uint(struct writer *writer, uint64_t number);
void message_item_str(struct writer *writer, const char *text);
void message_item_bin(struct writer *writer, const void *data, size_t size);
/* Complete the frame. Returns its size, or 0 if it did not fit. */
size_t message_close(struct writer *writer);

#endif
