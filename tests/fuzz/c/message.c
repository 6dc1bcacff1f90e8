/* Frame bodies: what is parsed can be read in full, and what is written again is the same. */
#define PROTOCOL_TABLES
#include "fuzz.h"

static bool write_list(struct writer *writer, const struct message *message,
		       const struct field *field)
{
	uint32_t count;
	struct mp_reader items = message_list(message, field->key, &count);
	char **strings;

	message_add_list(writer, field->key, count);
	if (field->kind == KIND_UINTS) {
		for (struct mp_value item; mp_read(&items, &item);)
			message_item_uint(writer, item.number);
		return true;
	}
	if (field->kind != KIND_STRS)
		return false; /* the agent sends none */
	strings = message_strings(message, field->key);
	for (uint32_t i = 0; i < count; i++)
		message_item_str(writer, strings[i]);
	free(strings);
	return true;
}

static bool write_field(struct writer *writer, const struct message *message,
			const struct field *field)
{
	const struct mp_value *value = &message->field[field->key];
	char text[MAX_STRING];

	switch (field->kind) {
	case KIND_UINT: message_add_uint(writer, field->key, value->number); return true;
	case KIND_BOOL: message_add_bool(writer, field->key, value->number); return true;
	case KIND_STR:
		message_str(message, field->key, text);
		message_add_str(writer, field->key, text);
		return true;
	case KIND_BIN: message_add_bin(writer, field->key, value->data, value->size); return true;
	default: return write_list(writer, message, field);
	}
}

static void check_same(const struct message *one, const struct message *two)
{
	CHECK(one->op == two->op && one->present == two->present);
	for (int i = 0; i < schemas[one->op].count; i++) {
		const struct field *field = &schemas[one->op].fields[i];
		const struct mp_value *a = &one->field[field->key], *b = &two->field[field->key];

		if (!message_has(one, field->key))
			continue;
		if (field->kind == KIND_UINT || field->kind == KIND_BOOL)
			CHECK(a->number == b->number);
		else
			CHECK(a->size == b->size);
		if (field->kind == KIND_STR || field->kind == KIND_BIN)
			CHECK(!memcmp(a->data, b->data, a->size));
	}
}

/* `room` bytes for it: a writer that does not fit must say so and write nowhere else. */
static void write_again(const struct message *message, size_t room)
{
	uint8_t *frame = malloc(room);
	struct message again;
	struct writer writer;
	size_t size;
	bool whole = true;

	message_open(&writer, frame, room, message->op);
	for (int i = 0; i < schemas[message->op].count; i++)
		if (message_has(message, schemas[message->op].fields[i].key))
			whole &= write_field(&writer, message, &schemas[message->op].fields[i]);
	size = message_close(&writer);
	CHECK(size <= room);
	if (size && whole) {
		CHECK(get_be32(frame) == size - 4);
		CHECK(!message_parse(&again, frame + 4, size - 4));
		check_same(message, &again);
	}
	free(frame);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct message message;
	uint8_t *body;
	size_t room;

	if (!size)
		return 0;
	room = 8 + 64u * data[0];
	/* A block of just this size: one byte too far is seen. */
	body = malloc(size - 1 ? size - 1 : 1);
	memcpy(body, data + 1, size - 1);
	if (!message_parse(&message, body, size - 1)) {
		use_message(&message);
		write_again(&message, room);
	}
	free(body);
	return 0;
}
