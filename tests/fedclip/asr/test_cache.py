"""The feature cache: exact, bounded, safe between processes, and a miss for anything damaged."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from fedclip.asr.cache import DiskCache, NoCache, Recording, default_folder, open_cache


def recordings(seed=0, frames=(7, 0, 3)):
    generator = torch.Generator().manual_seed(seed)
    return [Recording(torch.randn(n, 4, generator=generator).half(), f"said \u00e9 {n}") for n in frames]


def same(left, right):
    return len(left) == len(right) and all(
        a.text == b.text and torch.equal(a.features, b.features) for a, b in zip(left, right, strict=True)
    )


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def size(folder):
    return sum(path.stat().st_size for path in files(folder))


@pytest.mark.parametrize("frames", [(7, 0, 3), (), (0,), (1,)])
def test_what_was_put_comes_back_bit_for_bit(tmp_path, frames):
    kept = recordings(frames=frames)
    DiskCache(tmp_path, 1).put("key", kept)
    found = DiskCache(tmp_path, 1).get("key")
    assert same(found, kept)
    assert all(r.features.dtype == torch.float16 for r in found)
    assert DiskCache(tmp_path, 1).get("other") is None


def test_every_cut_and_every_changed_byte_is_a_miss(tmp_path):
    DiskCache(tmp_path, 1).put("key", recordings(frames=(2,)))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))] + [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(len(whole))]
    for payload in damaged:
        path.write_bytes(payload)
        assert DiskCache(tmp_path, 1).get("key") is None
        assert not path.exists()
    DiskCache(tmp_path, 1).put("key", recordings(frames=(2,)))
    assert same(DiskCache(tmp_path, 1).get("key"), recordings(frames=(2,)))


def test_the_limit_holds_after_each_write_and_recent_entries_survive(tmp_path):
    cache = DiskCache(tmp_path, 0.02)
    for i in range(60):
        cache.put(str(i), recordings(i, frames=(100,)))
        assert size(tmp_path) <= 20_000
    assert cache.get("0") is None
    assert same(cache.get("59"), recordings(59, frames=(100,)))


def test_the_entries_longest_unused_go_first(tmp_path):
    cache = DiskCache(tmp_path, 0.004)
    for i in range(4):
        cache.put(str(i), recordings(i, frames=(100,)))
    for age, path in enumerate(files(tmp_path)):
        os.utime(path, (1000 - age, 1000 - age))
    cache.get("1")
    DiskCache(tmp_path, 0.004).put("new", recordings(9, frames=(100,)))
    assert cache.get("1") is not None
    assert cache.get("new") is not None
    assert sum(cache.get(str(i)) is not None for i in (0, 2, 3)) < 3


def test_an_entry_above_the_limit_is_not_kept(tmp_path):
    DiskCache(tmp_path, 0.001).put("key", recordings(frames=(1000,)))
    assert files(tmp_path) == []


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path):
    folder = tmp_path / "ab"
    folder.mkdir()
    old, fresh = folder / "x.writing", folder / "y.writing"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    DiskCache(tmp_path, 1).put("key", recordings())
    assert not old.exists()
    assert fresh.exists()


def test_a_folder_that_cannot_be_written_warns_and_goes_on(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = DiskCache(blocked / "cache", 1)
    with pytest.warns(RuntimeWarning, match="cache_mb = 0"):
        cache.put("key", recordings())
    assert cache.get("key") is None


def hammer(folder, worker):
    cache = DiskCache(folder, 0.05)
    for i in range(150):
        key = (i * 7 + worker * 3) % 40
        found = cache.get(str(key))
        if found is not None and not same(found, recordings(key, frames=(100,))):
            raise SystemExit(1)
        cache.put(str(key), recordings(key, frames=(100,)))


def test_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=hammer, args=(tmp_path, worker)) for worker in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert size(tmp_path) <= 50_000 * 1.25
    assert all(path.suffix == ".features" for path in files(tmp_path))


def test_a_limit_of_zero_keeps_nothing(tmp_path):
    cache = open_cache(tmp_path, 0)
    cache.put("key", recordings())
    assert cache.get("key") is None
    assert isinstance(cache, NoCache)
    assert files(tmp_path) == []
    with pytest.raises(ValueError, match="NoCache"):
        DiskCache(tmp_path, 0)


def test_the_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "fedclip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "fedclip"
