"""Keeps memory that was freed, in place of giving it back to the kernel to fault it in again a moment later.

The activations of a step are freed and asked for again at each step. Above some size glibc takes such blocks from the
kernel and returns them at once, so a step of a CNN touches tens of thousands of fresh pages, which cost more than the
few blocks by which the peak of memory grows when they are kept. It stops to grow after some ten steps.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_NEVER = 1 << 30  # bytes; larger blocks are rare, and are given back as before


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; whether it does: with glibc only, so not on macOS or with musl."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # Both: to set one of them ends glibc's own adjustment of the other.
    return all([libc.mallopt(_MMAP_THRESHOLD, _NEVER), libc.mallopt(_TRIM_THRESHOLD, _NEVER)])
