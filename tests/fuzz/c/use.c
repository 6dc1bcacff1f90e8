/* Reads every byte of a message that was parsed, so that a sanitizer sees a wrong bound. */
#define PROTOCOL_TABLES
#include "fuzz.h"

static volatile uint64_t sink;

static void use_bytes(const uint8_t *data, size_t size)
{
	for (size_t i = 0; i < size; i++)
		sink += data[i];
}

static void use_list(const struct message *message, const struct field *field)
{
	uint32_t count, found = 0;
	struct mp_reader items = message_list(message, field->key, &count);
	struct mp_value item;

	CHECK(count <= MAX_LIST);
	while (mp_read(&items, &item)) {
		found++;
		if (field->kind == KIND_BINS)
			use_bytes(item.data, item.size);
		else
			sink += item.number;
	}
	CHECK(found == count && items.at == items.end);
}

static void use_strings(const struct message *message, const struct field *field)
{
	char **strings = message_strings(message, field->key);
	uint32_t count = message->field[field->key].size;

	CHECK(strings);
	for (uint32_t i = 0; i < count; i++) {
		CHECK(strings[i] && strlen(strings[i]) < MAX_STRING);
		use_bytes((const uint8_t *)strings[i], strlen(strings[i]));
	}
	CHECK(!strings[count]);
	free(strings);
}

static void use_field(const struct message *message, const struct field *field)
{
	char *text;

	switch (field->kind) {
	case KIND_UINT: sink += message_uint(message, field->key); break;
	case KIND_BOOL: CHECK(message_uint(message, field->key) <= 1); break;
	case KIND_STR:
		text = malloc(MAX_STRING);
		message_str(message, field->key, text);
		CHECK(strlen(text) == message->field[field->key].size);
		free(text);
		break;
	case KIND_BIN:
		use_bytes(message->field[field->key].data, message->field[field->key].size);
		break;
	case KIND_STRS: use_strings(message, field); break;
	default: use_list(message, field);
	}
}

void use_message(const struct message *message)
{
	const struct schema *schema = &schemas[message->op];

	for (int i = 0; i < schema->count; i++) {
		CHECK(schema->fields[i].optional || message_has(message, schema->fields[i].key));
		if (message_has(message, schema->fields[i].key))
			use_field(message, &schema->fields[i]);
	}
}
