"""Saved models: they come back bit for bit with their experiment, and anything else is refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fedclip.config import make_experiment
from fedclip.layout import Layout
from fedclip.model_file import check_alphabet, flatten, load_model, save_model
from fedclip.options import ConfigError

EXPERIMENT = make_experiment(
    {
        "run": {"rounds": 2},
        "task": {"name": "vision"},
        "population": {"size": 5},
        "sampler": {"cohort": 2},
        "local": {"lr": 0.1, "steps": 1},
    }
)
LAYOUT = Layout(("a.w", "a.b", "s", "e"), ((2, 3), (3,), (), (0,)), ("a.w", "a.b", "s", "e"))


def test_a_model_comes_back_bit_for_bit(tmp_path):
    params = torch.randn(10)
    params[0], params[1] = -0.0, 1e-45
    path = tmp_path / "model.safetensors"
    save_model(path, params, LAYOUT, EXPERIMENT, 7)
    experiment, tensors = load_model(path)
    assert experiment == EXPERIMENT
    assert flatten(tensors, LAYOUT).view(torch.int32).tolist() == params.view(torch.int32).tolist()
    assert tensors["a.w"].shape == (2, 3)
    assert tensors["s"].shape == ()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"], "something was left beside the model"
    with safe_open(path, "pt") as file:
        assert file.metadata()["round"] == "7"


def test_a_save_replaces_the_file_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    for value in (1.0, 2.0):
        save_model(path, torch.full((10,), value), LAYOUT, EXPERIMENT, 1)
    assert flatten(load_model(path)[1], LAYOUT).tolist() == [2.0] * 10


def test_what_is_no_model_of_this_project_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such model"):
        load_model(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"\x00" * 50)
    with pytest.raises(ConfigError, match="damaged"):
        load_model(tmp_path / "junk")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign", {"format": "pt"})
    with pytest.raises(ConfigError, match="format pt"):
        load_model(tmp_path / "foreign")


def test_a_model_that_spells_with_other_characters_is_refused():
    def spelling(*languages):
        return make_experiment(EXPERIMENT.plain() | {"task": {"name": "asr", "languages": list(languages)}})

    here = Path("some/model")
    check_alphabet(here, spelling("en"), spelling("en").task)
    check_alphabet(here, spelling("da"), spelling("nb").task)
    check_alphabet(here, EXPERIMENT, spelling("fr").task)
    with pytest.raises(ConfigError, match=r"some/model spells fr, en \(46 symbols\).*give task\.languages = \['fr', 'en'\]"):
        check_alphabet(here, spelling("fr", "en"), spelling("en", "fr").task)


def test_a_model_of_another_shape_is_refused_by_the_tensors_that_differ():
    with pytest.raises(ConfigError, match=r"2 tensors differ, among them a\.b, x"):
        flatten({"a.w": torch.ones(2, 3), "s": torch.ones(()), "e": torch.ones(0), "a.b": torch.ones(4), "x": torch.ones(1)}, LAYOUT)
