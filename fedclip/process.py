"""How a process that computes rounds is set up: one thread, so that bits do not depend on cores, and memory kept for reuse."""

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h
LARGEST_BLOCK = 32 << 20  # the most that glibc lets M_MMAP_THRESHOLD be
KEPT = 1 << 30


def settle_process() -> None:
    """Let torch compute on one thread, and let glibc keep freed memory.

    A reduction over several threads is cut where the number of cores says, and has other bits elsewhere; a simulation has a process a
    core instead. Training frees and asks for the same big blocks at every step: handing each back to the system costs a tenth of the
    time. Other C libraries are left as they are.
    """
    torch.set_num_threads(1)
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    mallopt(M_TRIM_THRESHOLD, KEPT)
