"""Per-cpu variables.

Source: include/linux/percpu-defs.h, arch/x86/kernel/setup_percpu.c, include/linux/cpumask.h.
"""

from collections.abc import Iterator
from typing import Any

from ovr.addresses import Gva
from ovr.errors import KernelNotFound
from ovr.kernel.kernel import Kernel

__all__ = ["for_each_possible_cpu", "per_cpu", "per_cpu_ptr"]


def for_each_possible_cpu(kernel: Kernel) -> Iterator[int]:
    """Yield the numbers of the CPUs that the kernel keeps per-cpu data for."""
    for number, word in enumerate(kernel["__cpu_possible_mask"].bits):
        yield from (64 * number + bit for bit in range(64) if word >> bit & 1)


def per_cpu_ptr(kernel: Kernel, address: Gva, cpu: int) -> Gva:
    """Return where the instance for one CPU of what is at a per-cpu address lies."""
    if cpu not in for_each_possible_cpu(kernel):
        raise ValueError(f"the guest has no CPU {cpu}")
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
    return codec.load(kernel.space, per_cpu_ptr(kernel, kernel.symbol(name), cpu), name)
