"""What a process says of its own memory."""

import subprocess
import sys

import numpy as np

from fedclip.process import peak_memory, resident_memory


def test_the_peak_is_of_this_process_and_stays_when_memory_is_freed() -> None:
    before = peak_memory()
    block = np.ones(300_000_000, dtype=np.uint8)
    assert peak_memory() >= resident_memory() - 5_000_000  # the kernel counts by batches of pages
    assert peak_memory() >= max(before, 295_000_000)  # a test before may have taken more
    # A process that is started now inherits nothing of this one's memory, and nothing of it in its peak.
    code = "import sys; import fedclip.process as p; sys.stdout.write(f'{p.peak_memory()} {p.resident_memory()}')"
    peak, resident = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert resident - 5_000_000 <= peak < resident + 100_000_000
    high = peak_memory()
    del block
    assert peak_memory() >= high - 5_000_000
