"""Whether a worker keeps the memory that it frees.

The activations of a step are freed and asked for again at each step. Above some size glibc takes such blocks from the
kernel and returns them at once, so a step of a CNN touches tens of thousands of fresh pages, which cost more than the
few blocks by which the peak of memory grows when they are kept. It stops to grow after some ten steps.

All threads share one arena: in those that glibc makes for other threads, where messages arrive and samples are read,
nothing above 64 MB has room, so that it would come from the kernel each time.

Where blocks of weights come and go (``runtime.offload``), it is the other way round: aligned pieces seldom fit into the
gaps that others leave, so what is freed would pile up to the size of the whole model.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of <malloc.h>
_LARGE = 1 << 20  # bytes
_NEVER = 1 << 30  # bytes; larger blocks are rare, and are given back as before


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; whether it does: with glibc only, so not on macOS or with musl."""
    return _set({_MMAP_THRESHOLD: _NEVER, _TRIM_THRESHOLD: _NEVER, _ARENA_MAX: 1})


def return_freed_memory() -> bool:
    """Let this process give large pieces back as soon as they are free; whether it does, as above."""
    return _set({_MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: _LARGE})


def _set(settings: dict[int, int]) -> bool:
    """Both thresholds always: to set one of them ends glibc's own adjustment of the other."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    answers = [libc.mallopt(setting, value) for setting, value in settings.items()]
    return all(answers)
