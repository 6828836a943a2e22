"""Cores and memory that this process may use."""

import ctypes
import os
from pathlib import Path

# Control group of a container, version 2.
GROUP = Path("/sys/fs/cgroup")
# Parameters of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# glibc takes smaller allocations from its heap, others directly from the system (the largest allowed value).
HEAP_LIMIT = 32 * 2**20


def usable_cores() -> int:
    """Processor cores: a container or taskset may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_memory() -> float:
    """Bytes of memory that are free on the machine and below the limit of the container."""
    import psutil

    return min(psutil.virtual_memory().available, _container_limit())


def keep_freed_memory() -> None:
    """Keep memory that this process frees, for its next allocations. Without an effect where libc is not glibc.

    A training step allocates and frees gigabytes. By default glibc returns them to the system after each micro-batch,
    which then clears every page again before the next use. The peak stays the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Never return the end of the heap, and take all smaller allocations from the heap.
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_THRESHOLD, HEAP_LIMIT)


def _container_limit() -> float:
    """Bytes left below the memory limit of this container, infinite where there is none."""
    try:
        # memory.max is the word "max" where there is no limit, which float() refuses.
        return float((GROUP / "memory.max").read_text()) - float((GROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
