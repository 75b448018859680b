"""Experiment files: every mistake is named, nothing heavy is imported for one, and the digest names what is computed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomli_w

from fedclip.config import apply_overrides, load_experiment, make_experiment
from fedclip.options import ConfigError
from strategies.naming import run_digest
from strategies.recipes import resolve

TEXT = """
[run]
rounds = 3
[task]
name = "vision"
[population]
size = 50
[sampler]
cohort = 5
[local]
lr = 0.1
steps = 2
[strategy]
client = [{ clip_by_global_norm = { max_norm = 2.0 } }, { clip_per_layer = { max_norm = 1.0 } }]
server = [{ lamb = { lr = 0.01 } }]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text(TEXT)
    return path


def refused(file, *overrides):
    with pytest.raises(ConfigError) as caught:
        resolve(load_experiment(file, overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.rouns=4", ["run.rouns", "4", "rounds", "Did you mean 'rounds'?"]),
        ("run.rounds=0", ["run.rounds", "greater than or equal to 1", "got 0"]),
        ("run.engine='rey'", ["run.engine", "'ray' or 'process'", "got 'rey'"]),
        ("run.device='gpu'", ["run.device", "cuda", "got 'gpu'"]),
        ("runn.rounds=4", ["runn", "Did you mean 'run'?"]),
        ("task.name='visoin'", ["task.name", "'visoin'", "asr, ", "Did you mean 'vision'?"]),
        ("task.alpa=1", ["task.alpa", "alpha", "Did you mean 'alpha'?"]),
        ("task.alpha=-1", ["task.alpha", "greater than 0", "got -1"]),
        ("sampler.cohort=51", ["sampler.cohort", "at most population.size = 50", "51"]),
        ("sampler.name='fixed'", ["sampler.name", "'poisson'", "'fixed'"]),
        ("local.learning_rate=1", ["local.learning_rate", "lr", "steps"]),
        ("local.momentum=1.5", ["local.momentum", "less than 1", "got 1.5"]),
        ("strategy.method='fedavgg'", ["strategy.method", "'fedavgg'", "fedavg, fedopt, pfl4asr", "Did you mean 'fedavg'?"]),
        ("strategy.weigting='uniform'", ["strategy.weigting", "weighting", "Did you mean 'weighting'?"]),
        ("strategy.client.clip_per_layer.max_nrom=1", ["strategy.client.clip_per_layer.max_nrom", "Did you mean 'max_norm'?"]),
        (
            "strategy.client.clip_per_layer.split='dims'",
            ["strategy.client.clip_per_layer.split", "'uniform', 'dim' or 'weights'", "'dims'"],
        ),
        (
            "strategy.client.clipper.max_norm=1",
            ["strategy.client.clipper.max_norm", "no stage 'clipper'", "clip_by_global_norm", "clip_per_layer"],
        ),
        ("strategy.client=3", ["strategy.client", "3"]),
        ("strategy.client='clip_per_layer'", ["strategy.client"]),
        ("strategy.server=[{rmsprop={lr=1}}]", ["strategy.server.rmsprop", "known:", "adam"]),
        ("strategy.sampler=3", ["strategy.sampler", "[sampler]"]),
        ("privacy.noise_multiplier=0", ["privacy.noise_multiplier", "greater than 0", "got 0"]),
        ("codec.name='pakced'", ["codec.name", "'pakced'", "known: dense", "Did you mean 'packed'?"]),
        ("codec.levle=3", ["codec.dense.levle", "unknown key"]),
        ("run.seed.x=1", ["run.seed", "valid integer", "{'x': 1}"]),
        ("run.rounds.x=1", ["run.rounds.x", "section above 'x'", "got 3"]),
        ("rounds", ["section.key=value", "'rounds'"]),
        ("=3", ["section.key=value"]),
    ],
)
def test_a_mistake_is_told_with_its_key_its_value_and_what_is_allowed(file, override, said):
    message = refused(file, override)
    assert all(part in message for part in said), message


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_experiment(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_experiment(tmp_path / "bad.toml")


def test_keys_are_set_anew_also_in_lists_by_the_stage_s_name(file):
    changed = load_experiment(
        file, ["strategy.client.clip_per_layer.max_norm=0.25", "local.lr=0.5", "run.name=mine", "privacy.noise_multiplier = 1.5"]
    )
    client = changed.strategy.model_extra["client"]
    assert client == [{"clip_by_global_norm": {"max_norm": 2.0}}, {"clip_per_layer": {"max_norm": 0.25}}]
    assert (changed.local["lr"], changed.run.name, changed.privacy.noise_multiplier) == (0.5, "mine", 1.5)
    assert apply_overrides(load_experiment(file), ["local.lr=0.5"]).local["lr"] == 0.5


UNCHANGED = [
    "run.rounds=9",
    "run.workers=3",
    "run.engine='process'",
    "run.reply='updates'",
    "run.out='elsewhere'",
    "run.name='b'",
    "ray.cpus_per_worker=0.5",
    "evaluation.every=3",
    "central.lr=0.5",
]
CHANGED = [
    "run.seed=2",
    "task.alpha=0.6",
    "task.channels=8",
    "population.size=51",
    "sampler.cohort=6",
    "local.lr=0.2",
    "local.steps=3",
    "local.batch_size=9",
    "strategy.client.clip_per_layer.max_norm=0.5",
    "strategy.server.lamb.lr=0.02",
    "strategy.server.lamb.eps=1e-5",
    "privacy.noise_multiplier=1.0",
    "strategy.weighting='examples'",
]


def digest(file, *overrides):
    return run_digest(resolve(load_experiment(file, overrides)))


@pytest.mark.parametrize("override", UNCHANGED)
def test_how_it_is_run_does_not_change_the_digest(file, override):
    assert digest(file, override) == digest(file)


def test_all_that_changes_the_result_changes_the_digest(file):
    digests = [digest(file), *(digest(file, override) for override in CHANGED)]
    assert len(set(digests)) == len(CHANGED) + 1


EXPERIMENTS = [p for p in sorted((Path(__file__).parents[2] / "experiments").glob("*.toml")) if "base" not in tomllib.loads(p.read_text())]


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS], ids=str)
def test_a_resolved_experiment_is_the_same_again_from_its_own_toml(file, tmp_path, experiment):
    resolved = resolve(load_experiment(experiment or file, ["run.out='x'"]))
    copy = tmp_path / "config.toml"
    copy.write_text(tomli_w.dumps(resolved.plain()))
    again = resolve(load_experiment(copy))
    assert again.plain() == resolved.plain() == make_experiment(resolved.plain()).plain()
    assert run_digest(again) == run_digest(resolved)
    assert tomllib.loads(copy.read_text())["run"]["out"] == "x"


def test_a_default_that_is_written_out_is_the_same_experiment(file):
    assert digest(file, "local.batch_size=8", "strategy.server.lamb.lr=0.01", "run.seed=1") == digest(file)


IMPORTS = [
    "import fedclip.config",
    "import experiments.cli",
    "from experiments.prepare import read_experiment; from pathlib import Path\nread_experiment(Path({file!r}), [])",
    "from experiments.prepare import read_experiment; from pathlib import Path\n"
    "from fedclip.options import ConfigError\n"
    "try:\n    read_experiment(Path({file!r}), ['strategy.server.lamb.lrr=1'])\n"
    "except ConfigError:\n    pass\nelse:\n    raise SystemExit(5)",
]


@pytest.mark.parametrize("code", IMPORTS)
def test_reading_and_refusing_import_no_torch(file, code):
    check = "\nimport sys\nloaded = {'torch', 'flwr', 'ray'} & set(sys.modules)\nassert not loaded, loaded"
    code = code.format(file=str(file)) + check
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
