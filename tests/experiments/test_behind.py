"""`Behind`: what is begun is done once, whatever comes between, and what it raises is raised by whoever waits."""

import threading
import time

import pytest

from experiments.behind import Behind


def test_things_are_done_one_after_another_on_another_thread():
    behind, done = Behind(), list[tuple[int, str]]()

    def slow(n: int) -> None:
        time.sleep(0.02)
        done.append((n, threading.current_thread().name))

    for n in range(3):
        behind.start(lambda n=n: slow(n))
        assert len(done) == n
    behind.wait()
    behind.wait()
    assert done == [(n, "fedclip-behind") for n in range(3)]


@pytest.mark.parametrize("began", [False, True])
def test_what_a_signal_kept_from_its_start_is_done_once_by_whoever_waits(began, monkeypatch):
    behind, done, start = Behind(), list[int](), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if began:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        behind.start(lambda: done.append(1))
    behind.wait()
    assert done == [1]


def test_an_error_is_raised_once_by_whoever_waits():
    behind = Behind()
    behind.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        behind.start(lambda: None)
    behind.wait()


def test_what_a_second_signal_interrupts_is_done_by_the_next_to_wait(monkeypatch):
    behind, signals, done = Behind(), [KeyboardInterrupt], list[int]()

    def call() -> None:
        if signals:
            raise signals.pop()
        done.append(1)

    def never(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", never)
    with pytest.raises(KeyboardInterrupt):
        behind.start(call)
    with pytest.raises(KeyboardInterrupt):
        behind.wait()
    behind.wait()
    assert done == [1]
