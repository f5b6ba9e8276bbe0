"""How the C library hands out memory while a model trains on a CPU.

A step frees hundreds of megabytes of activations and asks for them again. By default glibc gives large blocks back to
the kernel at once, and every page of the next step's blocks is a fault: tens of thousands a step, on one thread. Kept
blocks and 2 MB pages cost nothing. But a hole that an aligned block leaves seldom fits the next, so kept blocks grow to
half as much again as what is alive: where memory is what lacks, `return_blocks` is the other way.
"""

from __future__ import annotations

import ctypes
import os
import platform

__all__ = ["keep_blocks", "large_pages", "return_blocks"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them, from malloc.h
LARGE = 1 << 20  # bytes of a block that `return_blocks` has on pages of its own


def large_pages() -> None:
    """Ask torch to put tensors of 2 MB and more on large pages. Works before torch is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_blocks() -> bool:
    """Tell glibc to reuse freed blocks; whether it agreed. Other C libraries are left alone."""
    if platform.libc_ver()[0] != "glibc" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))


def return_blocks() -> bool:
    """Tell glibc to take large blocks from the kernel and to give them back when they are freed, each by itself, so
    that nothing is held but what is alive; whether it agreed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE))
