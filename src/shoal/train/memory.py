"""What the allocator of a CPU process should do with freed memory: keep it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # glibc's names for mallopt(3)


@functools.cache
def keep_freed_memory() -> None:
    """Once per process, where the C library is glibc; elsewhere nothing.

    glibc gives every freed block of some MB back to the system, and each step of a fleet asks for the same blocks again, page by page. On two cores
    the reference model of ``benchmarks/throughput.py`` made 18 to 20 steps/s so, and 24.5 with the blocks kept. The process stays as large as it once was.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # no such library, no such function: another allocator
        libc = ctypes.CDLL(None)
        for option, value in ((MMAP_THRESHOLD, 32 << 20), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 64 << 20)):
            libc.mallopt(option, value)
