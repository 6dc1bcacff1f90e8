"""Per-cpu variables.

Source: include/linux/percpu-defs.h, arch/x86/kernel/setup_percpu.c, include/linux/cpumask.h.
"""

from collections.abc import Iterator
from typing import Any, Final

from ovr.errors import KernelNotFound
from ovr.kernel.kernel import Kernel
from ovr.kernel.types.live import types_that_fit
from ovr.memory.addresses import Gva

__all__ = ["for_each_possible_cpu", "per_cpu", "per_cpu_ptr"]

MAX_CPUS: Final = 1 << 16
"""More than NR_CPUS can be (arch/x86/Kconfig: 8192)."""


def for_each_possible_cpu(kernel: Kernel) -> Iterator[int]:
    """Yield the numbers of the CPUs that the kernel keeps per-cpu data for.

    Raises:
        KernelNotFound: the kernel claims to be for more CPUs than any is.
    """
    with types_that_fit():
        bits = kernel["__cpu_possible_mask"].bits
        if 64 * len(bits) > MAX_CPUS:
            raise KernelNotFound(f"the guest's kernel claims to be for {64 * len(bits)} CPUs")
        words = [int(word) for word in bits]
    for number, word in enumerate(words):
        yield from (64 * number + bit for bit in range(64) if word >> bit & 1)


def per_cpu_ptr(kernel: Kernel, address: Gva, cpu: int) -> Gva:
    """Return where the instance for one CPU of what is at a per-cpu address lies."""
    if cpu not in for_each_possible_cpu(kernel):
        raise ValueError(f"the guest has no CPU {cpu}")
    with types_that_fit():
        offset = kernel.pointer("unsigned long", kernel.symbol("__per_cpu_offset"))[cpu]
        return Gva((address + offset) % (1 << 64))


def per_cpu(kernel: Kernel, name: str, cpu: int) -> Any:
    """Return a per-cpu variable of one CPU: a view, or a scalar's value.

    Raises:
        KernelNotFound: the kernel has no such variable.
    """
    codec = kernel.types.variable(name)
    if codec is None:
        raise KernelNotFound(f"the guest's kernel has no per-cpu variable {name}")
    at = per_cpu_ptr(kernel, kernel.symbol(name), cpu)
    with types_that_fit():
        return codec.load(kernel.space, at, name)
