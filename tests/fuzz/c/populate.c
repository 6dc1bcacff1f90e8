/* The ranges of Touch and Map: what check() lets pass cannot overflow or cut a page. */
#include "fuzz.h"

#include "../../../ovr/guest/populate.c"

/* Parts of the agent that populate.c needs, never called here. */
void loop_watch(struct loop *loop, int fd, short events, callback call, void *context)
{
	(void)loop, (void)fd, (void)events, (void)call, (void)context;
	abort();
}

void complain(const char *format, ...) { (void)format; }
void priority_real_time(pid_t pid) { (void)pid, abort(); }
void reap_children(void) { abort(); }
void sleep_ms(int ms) { (void)ms, abort(); }
int64_t now_ms(void) { abort(); }
void session_send(struct session *session, struct writer *writer)
{
	(void)session, (void)writer;
	abort();
}

struct writer session_writer(struct session *session, enum op op)
{
	(void)session, (void)op;
	abort();
}

void session_refuse(struct session *session, enum code code, const char *format, ...)
{
	(void)session, (void)code, (void)format;
	abort();
}

static void check_portions(const struct message *message, uint64_t ranges)
{
	struct mp_value pid, keep, count;
	struct mp_reader portions;
	uint32_t numbers;

	portions = message_list(message, KEY_PORTIONS, &numbers);
	CHECK(numbers % 3 == 0);
	for (; numbers; numbers -= 3) {
		CHECK(mp_read(&portions, &pid) && mp_read(&portions, &keep) &&
		      mp_read(&portions, &count));
		CHECK(keep.number <= 1 && count.number && count.number <= ranges);
		ranges -= count.number;
	}
	CHECK(!ranges);
}

static void check_ranges(const struct message *message)
{
	unsigned __int128 limit =
		message->op == OP_MAP ? message_uint(message, KEY_SIZE) : 1ull << 57;
	struct mp_value start, size;
	struct mp_reader ranges;
	uint32_t count;

	if (check(message))
		return;
	CHECK(limit && limit <= 1ull << 57 && limit % PAGE == 0);
	ranges = message_list(message, KEY_RANGES, &count);
	CHECK(count % 2 == 0 && count <= 2 * MAX_RANGES);
	for (uint32_t i = 0; i < count; i += 2) {
		CHECK(mp_read(&ranges, &start) && mp_read(&ranges, &size));
		CHECK(size.number && start.number % PAGE == 0 && size.number % PAGE == 0);
		CHECK((unsigned __int128)start.number + size.number <= limit);
	}
	if (message->op == OP_TOUCH)
		check_portions(message, count / 2);
}

/* Two bytes a number: what it is of, and its bits of a page number. */
static uint64_t number(struct input *input)
{
	uint8_t kind = input_byte(input), value = input_byte(input);

	switch (kind & 3) {
	case 0: return (uint64_t)value * PAGE;
	case 1: return (uint64_t)value << (kind >> 2);
	case 2: return (1ull << 57) - (uint64_t)value * PAGE;
	default: return -(uint64_t)value * PAGE + (kind >> 7);
	}
}

static void made(struct input *input)
{
	static uint8_t frame[1 << 16];
	struct message message;
	struct writer writer;
	size_t size;
	uint8_t first = input_byte(input), count = input_byte(input), left;

	message_open(&writer, frame, sizeof(frame), first & 1 ? OP_MAP : OP_TOUCH);
	if (first & 1) {
		message_add_uint(&writer, KEY_PID, input_byte(input));
		message_add_str(&writer, KEY_FILE, "fd/3");
		message_add_uint(&writer, KEY_SIZE, number(input));
	} else {
		left = input_byte(input);
		message_add_list(&writer, KEY_PORTIONS, left);
		while (left--)
			message_item_uint(&writer, input_byte(input) >> 6);
	}
	message_add_list(&writer, KEY_RANGES, count);
	while (count--)
		message_item_uint(&writer, number(input));
	size = message_close(&writer);
	CHECK(size && !message_parse(&message, frame + 4, size - 4));
	check_ranges(&message);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input input = {data, data + size};
	struct message message;

	if (input_byte(&input) & 1)
		made(&input);
	else if (!message_parse(&message, input.at, (size_t)(input.end - input.at)) &&
		 (message.op == OP_TOUCH || message.op == OP_MAP))
		check_ranges(&message);
	return 0;
}
