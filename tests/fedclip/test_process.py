"""What a process says of its own memory, and how its threads are set up."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from experiments.central import Central
from experiments.contestants.task import experiment_of
from experiments.prepare import prepare
from fedclip.process import flushed, stand_back
from fedclip.simulation import InProcess

CODE = """
import subprocess, sys
import numpy as np
from fedclip.process import peak_memory, resident_memory

before = peak_memory()
block = np.ones(before + 300_000_000, dtype=np.uint8)
high, resident = peak_memory(), resident_memory()
# A process that is started now inherits nothing of this one's memory, and nothing of it in its peak.
code = "from fedclip.process import peak_memory, resident_memory; print(peak_memory(), resident_memory())"
peak, own = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
del block
print(before, high, resident, peak, own, peak_memory())
"""


def test_the_peak_is_of_this_process_and_stays_when_memory_is_freed() -> None:
    # In a process of its own: what an earlier test took would be the peak, whatever is taken here.
    told = subprocess.check_output([sys.executable, "-c", CODE], text=True).split()
    before, high, resident, peak, own, after = map(int, told)
    assert high >= before + 295_000_000
    assert high >= resident - 5_000_000  # the kernel counts by batches of pages
    assert own - 5_000_000 <= peak < own + 100_000_000
    assert after >= high - 5_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_a_thread_that_stands_back_leaves_the_others_alone():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with ThreadPoolExecutor(1, initializer=stand_back) as threads:
        niceness = threads.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        assert niceness.result() == 10
        assert threads.submit(torch.get_num_threads).result() == 1
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def faint():
    """Whether this thread has a number under 2^-126 in float32."""
    return bool((torch.full((9,), 1e-30) * 1e-10).any())


def test_numbers_too_small_for_their_digits_are_zeros_inside_the_block_alone():
    def fails():
        with flushed():
            assert not faint()
            raise OSError("the disk is gone")

    assert faint()
    with pytest.raises(OSError, match="the disk"):
        fails()
    assert faint()


@pytest.mark.parametrize("engine", ["federated", "central"])
def test_users_train_and_units_are_evaluated_without_them(engine, monkeypatch):
    prepared, seen = prepare(experiment_of("mlp", 2, 100, 1, "cpu", "process", "sums")), list[tuple[str, bool]]()
    loss = prepared.task.loss

    def watched(model, batch):
        seen.append(("loss", faint()))
        value = loss(model, batch)
        value.register_hook(lambda gradient: seen.append(("backward", faint())))
        return value

    monkeypatch.setattr(prepared.task, "loss", watched)
    monkeypatch.setattr(prepared.task, "evaluate", lambda model, unit: seen.append(("evaluate", faint())) or {})
    monkeypatch.setattr(prepared.task, "summarise", lambda counts, seed: {})
    runs = InProcess(prepared.method, prepared.task, "s", "r") if engine == "federated" else Central(prepared)
    runs.round()
    runs.evaluate_units()
    assert set(seen) == {("loss", False), ("backward", False), ("evaluate", False)}
    assert faint()
