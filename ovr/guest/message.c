/* Parse and write messages by the tables that wire.py generates. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PROTOCOL_TABLES
#include "agent.h"

static const uint8_t scalar_type[] = {
	[KIND_UINT] = MP_UINT,  [KIND_STR] = MP_STR,  [KIND_BIN] = MP_BIN,  [KIND_BOOL] = MP_BOOL,
	[KIND_UINTS] = MP_UINT, [KIND_STRS] = MP_STR, [KIND_BINS] = MP_BIN,
};

const char *code_name(enum code code)
{
	return code_names[code];
}

enum code code_of_errno(int error)
{
	switch (error) {
	case ENOMEM:
		return CODE_NO_MEMORY;
	case ENOSPC:
	case EDQUOT:
		return CODE_NO_SPACE;
	default:
		return CODE_SYSTEM;
	}
}

static bool equals(const struct mp_value *value, const char *text)
{
	return value->size == strlen(text) && !memcmp(value->data, text, value->size);
}

static bool read_scalar(struct mp_reader *reader, struct mp_value *value, enum kind kind)
{
	if (!mp_read(reader, value) || value->type != scalar_type[kind])
		return false;
	/* Strings must be usable as C strings. */
	return value->type != MP_STR ||
	       (value->size < MAX_STRING && !memchr(value->data, 0, value->size));
}

static bool read_field(struct mp_reader *reader, struct mp_value *value, enum kind kind)
{
	struct mp_value item;

	if (kind < KIND_UINTS)
		return read_scalar(reader, value, kind);
	if (!mp_read(reader, value) || value->type != MP_ARRAY || value->size > MAX_LIST)
		return false;
	for (uint32_t i = 0; i < value->size; i++)
		if (!read_scalar(reader, &item, kind))
			return false;
	value->number = (uint64_t)(reader->at - value->data);
	return true;
}

static const struct schema *find_schema(const struct mp_value *name)
{
	for (size_t i = 0; i < OP_COUNT; i++)
		if (equals(name, schemas[i].name))
			return &schemas[i];
	return NULL;
}

/* "op" may be at any position in the map: find it before the fields are checked. */
static const struct schema *read_op(struct mp_reader reader, uint32_t pairs)
{
	struct mp_value key, value;

	while (pairs--) {
		if (!mp_read(&reader, &key) || key.type != MP_STR || !mp_read(&reader, &value))
			return NULL;
		if (equals(&key, "op"))
			return value.type == MP_STR ? find_schema(&value) : NULL;
		if (value.type == MP_MAP)
			return NULL;
		if (value.type == MP_ARRAY)
			for (uint32_t i = value.size; i; i--)
				if (!mp_read(&reader, &value) || value.type >= MP_ARRAY)
					return NULL;
	}
	return NULL;
}

static const char *read_pair(struct mp_reader *reader, const struct schema *schema,
			     struct message *message, bool *op_seen)
{
	struct mp_value name, op;

	if (!mp_read(reader, &name) || name.type != MP_STR)
		return "a key is not a string";
	if (equals(&name, "op")) {
		if (*op_seen)
			return "repeated field";
		*op_seen = true;
		return mp_read(reader, &op) ? NULL : "truncated";
	}
	for (int i = 0; i < schema->count; i++) {
		const struct field *field = &schema->fields[i];

		if (!equals(&name, key_names[field->key]))
			continue;
		if (message_has(message, field->key))
			return "repeated field";
		message->present |= 1ull << field->key;
		return read_field(reader, &message->field[field->key], field->kind) ?
			       NULL :
			       "a field has the wrong type or is too long";
	}
	return "unknown field";
}

const char *message_parse(struct message *message, const uint8_t *body, size_t size)
{
	struct mp_reader reader = {body, body + size};
	const struct schema *schema;
	const char *error;
	bool op_seen = false;
	struct mp_value map;

	if (!mp_read(&reader, &map) || map.type != MP_MAP)
		return "not a map";
	schema = read_op(reader, map.size);
	if (!schema)
		return "unknown message";
	message->op = (enum op)(schema - schemas);
	message->present = 0;
	for (uint32_t i = 0; i < map.size; i++) {
		error = read_pair(&reader, schema, message, &op_seen);
		if (error)
			return error;
	}
	if (reader.at != reader.end)
		return "trailing bytes after the message";
	for (int i = 0; i < schema->count; i++)
		if (!schema->fields[i].optional && !message_has(message, schema->fields[i].key))
			return "a field is missing";
	return NULL;
}

bool message_has(const struct message *message, enum key key)
{
	return message->present >> key & 1;
}

uint64_t message_uint(const struct message *message, enum key key)
{
	return message->field[key].number;
}

void message_str(const struct message *message, enum key key, char text[MAX_STRING])
{
	const struct mp_value *value = &message->field[key];

	memcpy(text, value->data, value->size);
	text[value->size] = 0;
}

struct mp_reader message_list(const struct message *message, enum key key, uint32_t *count)
{
	const struct mp_value *value = &message->field[key];

	*count = value->size;
	return (struct mp_reader){value->data, value->data + value->number};
}

char **message_strings(const struct message *message, enum key key)
{
	uint32_t count;
	struct mp_reader reader = message_list(message, key, &count);
	size_t pointers = (count + 1) * sizeof(char *);
	/* The head of an encoded string is at least a byte: room for its NUL. */
	char **strings = malloc(pointers + message->field[key].number);
	char *at = (char *)strings + pointers;
	struct mp_value item;
	uint32_t i;

	if (!strings)
		return NULL;
	for (i = 0; i < count && mp_read(&reader, &item); i++) {
		strings[i] = at;
		memcpy(at, item.data, item.size);
		at += item.size;
		*at++ = 0;
	}
	strings[i] = NULL;
	return strings;
}

/* ------------------------------------------------------------------------ writing */

static uint8_t *reserve(struct writer *writer, size_t size)
{
	static uint8_t nowhere[MP_HEAD_MAX];
	uint8_t *at = writer->at;

	if ((size_t)(writer->end - writer->at) < size) {
		writer->overflow = true;
		return size <= sizeof(nowhere) ? nowhere : NULL;
	}
	writer->at += size;
	return at;
}

static void add_head(struct writer *writer, const uint8_t *head, size_t size)
{
	memcpy(reserve(writer, size), head, size);
}

static void add_bytes(struct writer *writer, const void *data, size_t size)
{
	uint8_t *out = size ? reserve(writer, size) : NULL;

	if (out && !writer->overflow)
		memcpy(out, data, size);
}

static void add_str(struct writer *writer, const char *text)
{
	uint8_t head[MP_HEAD_MAX];
	size_t size = strlen(text);

	add_head(writer, head, mp_write_str_head(head, (uint32_t)size));
	add_bytes(writer, text, size);
}

static void add_key(struct writer *writer, enum key key)
{
	writer->fields++;
	add_str(writer, key_names[key]);
}

/* The frame's length and the map's size are filled in at the end: 4 bytes, then map 16. */
#define FRAME_HEAD 7

void message_open(struct writer *writer, uint8_t *buffer, size_t size, enum op op)
{
	*writer = (struct writer){.start = buffer, .at = buffer, .end = buffer + size, .fields = 1};
	reserve(writer, FRAME_HEAD);
	add_str(writer, "op");
	add_str(writer, schemas[op].name);
}

void message_add_uint(struct writer *writer, enum key key, uint64_t number)
{
	add_key(writer, key);
	message_item_uint(writer, number);
}

void message_add_bool(struct writer *writer, enum key key, bool value)
{
	uint8_t head[MP_HEAD_MAX];

	add_key(writer, key);
	add_head(writer, head, mp_write_bool(head, value));
}

void message_add_str(struct writer *writer, enum key key, const char *text)
{
	add_key(writer, key);
	add_str(writer, text);
}

void message_add_bin(struct writer *writer, enum key key, const void *data, size_t size)
{
	uint8_t head[MP_HEAD_MAX];

	add_key(writer, key);
	add_head(writer, head, mp_write_bin_head(head, (uint32_t)size));
	add_bytes(writer, data, size);
}

void message_add_list(struct writer *writer, enum key key, uint32_t count)
{
	uint8_t head[MP_HEAD_MAX];

	add_key(writer, key);
	add_head(writer, head, mp_write_array_head(head, count));
}

void message_item_uint(struct writer *writer, uint64_t number)
{
	uint8_t head[MP_HEAD_MAX];

	add_head(writer, head, mp_write_uint(head, number));
}

void message_item_str(struct writer *writer, const char *text)
{
	add_str(writer, text);
}

void message_item_bin(struct writer *writer, const void *data, size_t size)
{
	uint8_t head[MP_HEAD_MAX];

	add_head(writer, head, mp_write_bin_head(head, (uint32_t)size));
	add_bytes(writer, data, size);
}

size_t message_close(struct writer *writer)
{
	size_t size = (size_t)(writer->at - writer->start);

	if (writer->overflow || size - 4 > MAX_FRAME)
		return 0;
	put_be32(writer->start, (uint32_t)size - 4);
	writer->start[4] = 0xde;
	writer->start[5] = (uint8_t)(writer->fields >> 8);
	writer->start[6] = (uint8_t)writer->fields;
	return size;
}
