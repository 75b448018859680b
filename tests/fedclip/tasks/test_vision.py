"""The vision task: its split, its dealing, its metrics. What every task must do is in tests/contracts/test_tasks.py."""

import numpy as np
import pytest
import torch

from fedclip.options import ConfigError
from fedclip.tasks.vision import SmallCNN, VisionTask, build_vision, deal_by_dirichlet
from fedclip.tasks.vision_options import VisionOptions

OPTIONS = VisionOptions(name="vision", channels=4)


def images_of(task, users):
    return [int(x.sum() * 1e4) for u in users for x, _ in task.load_user(u, np.random.default_rng(0))]


def test_users_share_all_the_training_images_and_none_of_the_held_out():
    # 1,797 images, of which round(0.2 * 1797) = 359 are held out, in ceil(359 / 36) = 10 shards.
    task = build_vision(OPTIONS, population=30, seed=0)
    assert sum(len(task.load_user(u, None)) for u in range(30)) == 1797 - 359
    assert task.held_out_units == 10
    with torch.inference_mode():
        assert sum(task.evaluate(task.make_model(), u)["images"] for u in range(10)) == 359
    images = np.zeros((50, 1, 8, 8), np.float32) + np.arange(50, dtype=np.float32)[:, None, None, None]
    small = VisionTask(images, np.arange(50) % 3, 4, OPTIONS, 0)
    trained = {int(x[0, 0, 0]) for u in range(4) for x, _ in small.load_user(u, None)}
    held_out = {int(small._images[i, 0, 0, 0]) for i in small._test}
    assert trained | held_out == set(range(50))
    assert not trained & held_out


def test_every_example_is_dealt_once_and_alpha_skews_classes():
    labels = np.repeat(np.arange(10), 100)
    skew = {}
    for alpha in (0.05, 100.0):
        shares = deal_by_dirichlet(labels, 20, alpha, np.random.default_rng(0))
        assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(1000))
        skew[alpha] = np.mean([np.bincount(labels[s], minlength=10).max() / len(s) for s in shares if len(s)])
    assert skew[0.05] > 0.5
    assert skew[100.0] < 0.2


def test_the_dealing_depends_on_the_seed_only():
    first, again, other = (build_vision(OPTIONS, population=10, seed=s) for s in (1, 1, 2))
    assert images_of(first, range(10)) == images_of(again, range(10)) != images_of(other, range(10))
    assert torch.equal(first.make_model().out.weight, again.make_model().out.weight)
    assert not torch.equal(first.make_model().out.weight, other.make_model().out.weight)


def test_the_model_maps_images_to_scores():
    assert SmallCNN(4, 10)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_the_interval_is_wilsons():
    # Wilson's interval for 80 of 100: (0.7112, 0.8666), for example from statsmodels' proportion_confint(80, 100, method="wilson").
    said = build_vision(OPTIONS, population=2, seed=0).summarise([{"loss": 50.0, "hits": 80.0, "images": 100.0}], 0)
    assert said["accuracy"] == 0.8
    assert said["eval_loss"] == 0.5
    assert (said["accuracy_low"], said["accuracy_high"]) == pytest.approx((0.7112, 0.8666), abs=1e-4)


def test_too_many_users_and_none_said_are_refused():
    with pytest.raises(ConfigError, match="at most 1438 users"):
        build_vision(OPTIONS, population=1439, seed=0)
    with pytest.raises(ConfigError, match=r"population\.size"):
        build_vision(OPTIONS, population=None, seed=0)
