"""How a process that computes rounds is set up: one thread, so that bits do not depend on cores, and memory kept for reuse."""

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h
LARGEST_BLOCK = 32 << 20  # the most that glibc lets M_MMAP_THRESHOLD be
KEPT = 1 << 30

GIVES_WAY = 10  # the niceness of a thread that does, at least


def settle_thread() -> None:
    """Let torch compute on this thread alone when it is called from it: a new thread would use all cores."""
    torch.set_num_threads(1)


def stand_back() -> None:
    """As `settle_thread`, and let this thread give way, for good, to whatever else is to run on the machine; where Linux is its system."""
    settle_thread()
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(GIVES_WAY, os.getpriority(os.PRIO_PROCESS, thread)))


@contextmanager
def flushed() -> Iterator[None]:
    """Let this thread take numbers that are too small for all of their digits, under 2^-126 in float32, for zeros inside the block.

    A processor takes many times as long over each of them, and a model that has learnt makes probabilities and gradients of this kind.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def settle_process() -> None:
    """Let torch compute on one thread, and let glibc keep freed memory.

    A reduction over several threads is cut where the number of cores says, and has other bits elsewhere; a simulation has a process a
    core instead. Training frees and asks for the same big blocks at every step: handing each back to the system costs a tenth of the
    time. Other C libraries are left as they are.
    """
    settle_thread()
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
    mallopt(M_TRIM_THRESHOLD, KEPT)


def trim_memory() -> None:
    """Hand freed memory back to the system, which `settle_process` lets glibc keep: after what is made once, such as a model to look at."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_memory() -> int:
    """Return how many bytes of memory this process has now; its peak so far where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return peak_memory()
    return pages * resource.getpagesize()


def peak_memory() -> int:
    """Return the most bytes of memory that this process ever had.

    `getrusage` counts what the process that started this one had at that moment, and is asked only where Linux does not say.
    """
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
