/*
 * Python with the sanitizers' runtime in it, so that the extension can be one
 * that was built with them. Programs that it starts have nothing of it, as
 * they would with LD_PRELOAD; another Python that it starts is this one again.
 */
#include <Python.h>

const char *__asan_default_options(void);
const char *__ubsan_default_options(void);

/* Python itself frees nothing at its end, and its pages are not all ours to look at. */
const char *__asan_default_options(void)
{
	return "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1";
}

const char *__ubsan_default_options(void)
{
	return "print_stacktrace=1:abort_on_error=1";
}

int main(int argc, char **argv)
{
	/* Every object an allocation of its own: whoever reads beyond its end is seen. */
	setenv("PYTHONMALLOC", "malloc", 0);
	return Py_BytesMain(argc, argv);
}
