"""Partitions: every example dealt at most once, the same in every process, and refused in words that say what to change."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from experiments.engines import open_engine
from experiments.prepare import prepare, read_experiment
from fedclip.options import ConfigError, validate
from fedclip.tasks.partition import deal
from fedclip.tasks.partition_options import PartitionOptions
from fedclip.tasks.vision import build_vision
from fedclip.tasks.vision_options import VisionOptions
from strategies.naming import run_digest
from tests.experiments.conftest import VISION

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40)) + 3  # 200 examples; no label begins at 0
USERS = 8


def options(**values):
    return TypeAdapter(PartitionOptions).validate_python(values)


def sizes_and_labels(parts):
    return [len(p) for p in parts], [len(set(LABELS[p])) for p in parts]


@pytest.mark.parametrize(
    ("values", "users", "whole"),
    [
        ({"name": "iid"}, 8, True),
        ({"name": "dirichlet", "alpha": 0.3}, 8, True),
        ({"name": "dirichlet", "alpha": [0.1] * 4 + [5.0] * 4, "self_balancing": True}, 8, True),
        ({"name": "inner_dirichlet", "alpha": 0.5, "partition_sizes": [25] * 8}, 8, True),
        ({"name": "pathological", "num_classes_per_partition": 2, "class_assignment_mode": "deterministic"}, 8, True),
        ({"name": "shard", "num_shards_per_partition": 2}, 8, False),  # 16 shards of floor(200 / 16) = 12 examples
        ({"name": "size", "partition_sizes": [1, 2, 3, 4, 5, 6, 7, 8]}, 8, False),
        ({"name": "linear"}, 8, True),
        ({"name": "square"}, 5, True),
        ({"name": "exponential"}, 4, True),
        # 2 labels * 10 users / 5 labels = 4 columns
        ({"name": "distribution", "num_unique_labels_per_partition": 2, "distribution_array": [[1.0, 2.0, 3.0, 4.0]] * 5}, 10, True),
    ],
)
def test_no_example_is_dealt_twice_and_the_seed_decides(values, users, whole):
    parts = deal(options(**values), LABELS, users, seed=4)
    dealt = np.concatenate(parts)
    assert len(parts) == users
    assert len(set(dealt.tolist())) == len(dealt)
    assert set(dealt.tolist()) <= set(range(200))
    assert (len(dealt) == 200) == whole
    again, other = (deal(options(**values), LABELS, users, seed=s) for s in (4, 5))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_partitions_are_what_their_names_say():
    sizes, labels = sizes_and_labels(deal(options(name="iid"), LABELS, USERS, 0))
    assert sizes == [25] * 8
    assert min(labels) >= 4
    sizes, labels = sizes_and_labels(deal(options(name="pathological", num_classes_per_partition=2), LABELS, USERS, 0))
    assert labels == [2] * 8
    sizes, labels = sizes_and_labels(deal(options(name="shard", num_shards_per_partition=1, shard_size=20), LABELS, USERS, 0))
    assert (sizes, labels) == ([20] * 8, [1] * 8)  # 40 examples a label: a shard of 20 has one label
    assert sizes_and_labels(deal(options(name="size", partition_sizes=[3, 9]), LABELS, 2, 0))[0] == [3, 9]
    # 200 n / 36, rounded down; the last takes what is left over.
    assert sizes_and_labels(deal(options(name="linear"), LABELS, USERS, 0))[0] == [5, 11, 16, 22, 27, 33, 38, 48]
    few, many = (np.mean(sizes_and_labels(deal(options(name="dirichlet", alpha=a), LABELS, USERS, 0))[1]) for a in (0.02, 100.0))
    assert few < 3 < many


def test_natural_ids_are_users():
    ids = np.array(["cy", "ann", "ben", "ann"] * 50)
    parts = deal(options(name="natural_id"), LABELS, None, 0, ids)
    assert [set(ids[p]) for p in parts] == [{"ann"}, {"ben"}, {"cy"}]
    assert [len(p) for p in parts] == [100, 50, 50]
    grouped = deal(options(name="grouped_natural_id", group_size=2), LABELS, 2, 0, ids)
    assert sorted(len(set(ids[p])) for p in grouped) == [1, 2]
    assert sum(len(p) for p in grouped) == 200
    with pytest.raises(ConfigError, match="natural_id' needs data that says who made each example"):
        deal(options(name="natural_id"), LABELS, 3, 0)
    with pytest.raises(ConfigError, match=r"population\.size: expected 3, the users that task\.partition gives, got 4"):
        deal(options(name="natural_id"), LABELS, 4, 0, ids)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "dirichlet", "alpha": 0.01, "min_partition_size": 20}, ["max number of attempts", "task.partition.min_partition_size"]),
        ({"name": "pathological", "num_classes_per_partition": 6}, ["greater than the number of unique classes", "population.size"]),
        ({"name": "exponential"}, ["not greater than 0", "Change population.size"]),
        ({"name": "size", "partition_sizes": [100] * 8}, ["greater than the size of the dataset 200"]),
        ({"name": "size", "partition_sizes": [100] * 2}, ["expected one size a user, 8 of them, got 2"]),
        ({"name": "shard", "shard_size": 50}, ["empty partitions", "task.partition.shard_size"]),
    ],
)
def test_what_the_library_refuses_is_a_mistake_of_the_file(values, said):
    with pytest.raises(ConfigError) as caught:
        deal(options(**values), LABELS, USERS, 0)
    assert all(words in str(caught.value) for words in ["task.partition", *said])


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedclip\[partitions\]'"):
        deal(options(name="iid"), LABELS, USERS, 0)


@pytest.mark.parametrize(
    ("partition", "said"),
    [
        ({"name": "dirichlet", "alhpa": 1}, "task.partition.alhpa: unknown key (its value is 1); known here: alpha, min_partition_size"),
        ({"name": "dirichlett"}, "task.partition: "),
        ({"name": "dirichlet", "alpha": 0.0}, "task.partition.alpha"),
        ({"name": "shard"}, "expected num_shards_per_partition or shard_size"),
    ],
)
def test_mistakes_in_the_section_name_its_keys(partition, said):
    with pytest.raises(ConfigError) as caught:
        validate(VisionOptions, {"name": "vision", "partition": partition}, "task")
    assert said in str(caught.value)
    with pytest.raises(ConfigError, match="alpha goes without partition only"):
        validate(VisionOptions, {"name": "vision", "alpha": 1.0, "partition": {"name": "iid"}}, "task")


PARTITION = ['task.partition={name="dirichlet", alpha=0.3, min_partition_size=2}', "population.size=20", "sampler.cohort=5"]


def test_images_are_dealt_by_a_partition_and_another_one_is_another_run(tmp_path):
    task = build_vision(
        VisionOptions(name="vision", partition={"name": "pathological", "num_classes_per_partition": 3}), population=30, seed=1
    )
    assert all(len(set(task.labels_of(u))) == 3 for u in range(30))
    assert sorted(y for _, y in task.load_user(7, None)) == sorted(task.labels_of(7))
    path = tmp_path / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    names = {run_digest(read_experiment(path, [f'task.partition.name="{n}"'] if n else [])) for n in ("", "iid", "linear", "square")}
    assert len(names) == 4


def test_another_process_deals_the_same_and_imports_no_flower():
    text = (
        "import json, sys, numpy as np; from fedclip.tasks.partition import deal; from fedclip.tasks.partition_options import Dirichlet\n"
        "parts = deal(Dirichlet(name='dirichlet', alpha=0.2), np.array(json.loads(sys.argv[1])), 12, 3)\n"
        "assert not {m.partition('.')[0] for m in sys.modules} & {'flwr', 'ray', 'torch'}\n"
        "print(json.dumps([part.tolist() for part in parts]))"
    )
    command = [sys.executable, "-c", text, json.dumps(LABELS.tolist())]
    there = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert [part.tolist() for part in deal(options(name="dirichlet", alpha=0.2), LABELS, 12, 3)] == there


@pytest.mark.usefixtures("ray_session")
def test_ray_gives_the_bits_of_one_process(tmp_path):
    path = tmp_path / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    results = []
    for overrides in (["run.engine=process"], ["run.workers=1"]):
        with open_engine(prepare(read_experiment(path, [*PARTITION, *overrides]))) as engine:
            engine.round()
            results.append(engine.state.params)
    assert torch.equal(*results)
