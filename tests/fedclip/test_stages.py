"""The vocabulary: names and arguments checked before anything is built, and stages that travel as plain data."""

import json
import subprocess
import sys

import pytest

from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.codec import DenseCodec
from fedclip.dgc import DGC
from fedclip.doors import load_door
from fedclip.local import LocalSGD
from fedclip.optimizers import LAMB, LARS, SGD, Adagrad, Adam, Yogi
from fedclip.options import ConfigError
from fedclip.packed import PackedCodec
from fedclip.quantize import Entropy, Fp16, Quantize, Sign
from fedclip.release import Gaussian
from fedclip.sampling import Available, FixedSize, Poisson
from fedclip.schedules import Schedule
from fedclip.sparsify import CommonMask, RandomK, TopK
from fedclip.stages import STAGES, build_stage, check_stage, describe_stage
from fedclip.transform import with_error_feedback

ALL = [
    ClipByGlobalNorm(0.5),
    ClipPerLayer(0.5, "weights", "normalize", "block", (1.0, 2.0)),
    with_error_feedback(ClipPerLayer(0.5)),
    SGD(Schedule(value=0.1, warmup=5), 0.9, True),
    Adam(Schedule.of(0.1), (0.8, 0.9), 1e-6, 0.1),
    LAMB(Schedule.of(0.1), trust_bounds=(0.1, 3.0), layers="block"),
    LARS(Schedule.of(0.1), 0.5, 0.02, 0.1, "block"),
    Yogi(Schedule.of(0.1), (0.8, 0.9), 1e-2, 0.5),
    Adagrad(Schedule.of(0.1), 1e-2, 0.5),
    Poisson(100, 2.5),
    LocalSGD(0.1, None, 2, 16, 1.0, 0.9),
    LocalSGD(0.1, 3, None, 16, 1.0, 0.0, "adamw", (0.5, 0.6), 1e-3, 0.1, 0.2, 3, 2, "bfloat16"),
    FixedSize(100, 7),
    Available(100, 7, 1.5),
    Gaussian(0.7),
    DenseCodec(),
    PackedCodec(9),
    DGC(0.01, 0.8, nesterov=True, clip_norm=2.0, nodes=4, normalization="sum", warmup=((0.25, 3),), small="sparse", grid="int8"),
    TopK(0.1, "model"),
    RandomK(0.1, 3, scale=True),
    CommonMask(0.1, 3),
    Fp16(),
    Quantize(4, 64, stochastic=False),
    Sign(),
    Entropy(3.0),
]


@pytest.mark.parametrize("stage", ALL, ids=lambda s: s.stage_name)
def test_each_is_rebuilt_from_its_description(stage):
    described = json.loads(json.dumps(describe_stage(stage)))
    assert list(described) == [stage.stage_name]
    assert build_stage(described) == stage


def test_every_name_is_tried_here():
    assert {s.stage_name for s in ALL} == set(STAGES)


def test_a_name_alone_has_no_arguments_and_defaults_apply():
    assert build_stage("dense") == DenseCodec()
    assert build_stage("packed") == PackedCodec(3)
    assert build_stage({"clip_per_layer": {"max_norm": 1}}) == ClipPerLayer(1.0, "dim", "clip", "tensor")
    assert build_stage({"sgd": {"lr": 0.5}}) == SGD(Schedule(value=0.5))
    assert build_stage({"adam": {"lr": {"value": 0.5, "warmup": 3}}}).lr == Schedule(value=0.5, warmup=3)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"clip_per_layr": {"max_norm": 1}}, ["at.clip_per_layr", "'clip_per_layr'", "known:", "clip_by_global_norm", "'clip_per_layer'?"]),
        ({"clip_per_layer": {"max_nrom": 1}}, ["at.clip_per_layer.max_nrom", "Did you mean 'max_norm'?", "split", "its value is 1"]),
        ({"clip_per_layer": {}}, ["at.clip_per_layer.max_norm", "missing"]),
        ({"clip_per_layer": {"max_norm": -1}}, ["at.clip_per_layer.max_norm", "greater than 0", "got -1"]),
        ({"clip_per_layer": {"max_norm": 1, "split": "dimm"}}, ["at.clip_per_layer.split", "'dim'", "'uniform'", "got 'dimm'"]),
        ({"sgd": {"lr": 0.1, "momentum": 1.0}}, ["at.sgd.momentum", "less than 1", "got 1.0"]),
        ({"with_error_feedback": {"inner": {"clip": {}}}}, ["at.with_error_feedback.inner.clip", "'clip'"]),
        (7, ["at", "'7'", "{ name = { argument = value } }"]),
        ({"sgd": 0.1}, ["at", "{ name = { argument = value } }"]),
        ({"sgd": {"lr": 1}, "adam": {"lr": 1}}, ["at", "{ name = { argument = value } }"]),
    ],
)
def test_errors_name_the_key_the_value_and_what_is_allowed(spec, said):
    with pytest.raises(ConfigError) as caught:
        check_stage(spec, "at")
    for part in said:
        assert part in str(caught.value)


def test_a_stage_of_one_s_own_comes_through_a_door():
    stage = build_stage({"tests.stages_of_tests:TopK": {"k": 3}})
    assert stage.k == 3
    assert describe_stage(stage) == {"tests.stages_of_tests:TopK": {"k": 3}}, "a name of its own is in no registry"
    assert build_stage(describe_stage(stage)) == stage
    assert build_stage({"with_error_feedback": {"inner": {"tests.stages_of_tests:TopK": {"k": 3}}}}).inner == stage


def test_a_stage_in_a_file_travels_by_its_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom fedclip.transform import Step, Transform\n"
        "@dataclass(frozen=True)\nclass Mine(Transform):\n    k: int = 1\n"
        "    def apply(self, update, state, ctx):\n        return Step(update)\n"
        "    def bound(self, incoming, layout):\n        return incoming\n"
    )
    stage = build_stage({f"{file}:Mine": {"k": 2}})
    described = describe_stage(stage)
    assert described == {f"{file}:Mine": {"k": 2}}
    assert build_stage(described) == stage
    assert type(stage) is load_door(f"{file}:Mine")


def test_what_is_no_dataclass_does_not_travel():
    with pytest.raises(TypeError, match="dataclass"):
        describe_stage(object())


def test_the_vocabulary_imports_no_torch():
    code = "import sys, fedclip.stages as s; s.check_stage({'lamb': {'lr': 0.1}}, 'x'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
