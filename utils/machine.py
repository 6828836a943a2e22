"""Cores and memory that this process may use."""

import os
from pathlib import Path

# Control group of a container, version 2.
GROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Processor cores: a container or taskset may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_memory() -> float:
    """Bytes of memory that are free on the machine and below the limit of the container."""
    import psutil

    return min(psutil.virtual_memory().available, _container_limit())


def _container_limit() -> float:
    """Bytes left below the memory limit of this container, infinite where there is none."""
    try:
        # memory.max is the word "max" where there is no limit, which float() refuses.
        return float((GROUP / "memory.max").read_text()) - float((GROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
