"""The vision task: its split, its dealing, its metrics. What every task must do is in tests/contracts/test_tasks.py."""

import numpy as np
import pytest
import torch
from torch import nn

from fedclip.options import ConfigError, validate
from fedclip.tasks.vision import SmallCNN, VisionTask, build_vision, deal_by_dirichlet
from fedclip.tasks.vision_options import VisionOptions
from tests.idx_folder import idx_bytes, write_idx_folder

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


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 20), (1, 5, 7)])
@pytest.mark.parametrize("hidden", [0, 6])
def test_the_model_maps_images_to_scores(shape, hidden):
    assert SmallCNN(4, 10, shape, hidden)(torch.zeros(3, *shape)).shape == (3, 10)


def test_sizes_of_the_cnn():
    def size(*arguments):
        return sum(p.numel() for p in SmallCNN(*arguments).parameters())

    # Convolutions (1 * 9 + 1) * c and (c * 9 + 1) * 2c, then 2c * height / 4 * width / 4 features.
    assert size(16, 10) == 160 + 4640 + (32 * 4 + 1) * 10
    assert size(32, 10, (1, 28, 28), 128) == 320 + 18_496 + (64 * 49 + 1) * 128 + 129 * 10 == 421_642


def test_the_digits_have_the_weights_and_batches_they_always_had():
    task = build_vision(VisionOptions(name="vision"), population=50, seed=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1), nn.Linear(128, 10)]
    expected = [p for layer in layers for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(task.make_model().parameters(), expected, strict=True))
    assert [n for n, _ in task.make_model().named_parameters()][::2] == ["conv1.weight", "conv2.weight", "out.weight"]
    user = max(range(50), key=task.cost)
    examples = [(task._images[i], int(task._labels[i])) for i in task._train[task._shares[user]]]
    order = np.random.default_rng(1).permutation(len(examples))
    batches = list(task.batches(task.load_user(user, None), 8, np.random.default_rng(1)))
    assert [len(y) for _, y in batches] == [len(order[n : n + 8]) for n in range(0, len(order), 8)]
    for start, (images, labels) in zip(range(0, len(order), 8), batches, strict=True):
        chosen = [examples[i] for i in order[start : start + 8]]
        assert torch.equal(images, torch.stack([x for x, _ in chosen]))
        assert labels.tolist() == [y for _, y in chosen]


def idx_task(folder, population=9, seed=2, **options):
    return build_vision(VisionOptions(name="vision", data="idx", **options), population=population, seed=seed, data_dir=folder)


def test_idx_images_are_dealt_once_each_and_the_t10k_images_held_out(tmp_path):
    task = idx_task(write_idx_folder(tmp_path, train=200, test=90))
    dealt = np.concatenate([task._train[task._shares[u]] for u in range(9)])
    assert sorted(dealt) == list(range(200))
    assert list(task._test) == list(range(200, 290))
    assert sum(len(task.load_user(u, None)) for u in range(9)) == sum(task.cost(u) for u in range(9)) == 200
    # ceil(90 / 36) units.
    assert task.held_out_units == 3
    with torch.inference_mode():
        assert [task.evaluate(task.make_model(), u)["images"] for u in range(3)] == [36, 36, 18]


def test_large_held_out_sets_are_forty_units():
    images, labels = np.zeros((10_100, 1, 4, 4), np.uint8), np.zeros(10_100, np.uint8)
    task = VisionTask(images, labels, 3, VisionOptions(name="vision", data="idx"), 0, held_out=10_000)
    assert task.held_out_units == 40
    with torch.inference_mode():
        assert task.evaluate(task.make_model(), 39)["images"] == 250


def test_idx_pixels_are_bytes_in_memory_and_floats_up_to_one_in_batches(tmp_path):
    task = idx_task(write_idx_folder(tmp_path), population=1)
    assert task._images.dtype == torch.uint8
    user = task.load_user(0, None)
    image, label = user[3]
    place = int(user.chosen[3])
    assert image.dtype == torch.float32
    assert torch.equal(image, task._images[place] / 255)
    assert label == int(task._labels[place])
    assert torch.equal(user[2:5][1][0], image)
    ((images, labels),) = task.batches(user, 60, np.random.default_rng(0))
    assert images.shape == (60, 1, 8, 8)
    assert images.dtype == torch.float32
    assert 0.9 < float(images.max()) <= 1.0
    assert labels.dtype == torch.int64
    order = np.random.default_rng(0).permutation(60)
    assert torch.equal(images[7], user[int(order[7])][0])


def test_batches_of_a_list_are_those_of_the_view(tmp_path):
    task = idx_task(write_idx_folder(tmp_path), population=1)
    user = task.load_user(0, None)
    views, lists = (task.batches(e, 7, np.random.default_rng(0)) for e in (user, list(user)))
    assert all(torch.equal(a, b) for x, y in zip(views, lists, strict=True) for a, b in zip(x, y, strict=True))
    assert list(task.batches(user[:0], 7, np.random.default_rng(0))) == []


def test_the_model_has_a_score_for_each_class_whether_it_is_there_or_not(tmp_path):
    task = idx_task(write_idx_folder(tmp_path, classes=3), classes=12, hidden=5)
    assert task.make_model().out.weight.shape == (12, 5)


def test_idx_needs_a_folder_and_images_that_fit(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.data: 'idx' reads images, but run\.data_dir is not set"):
        idx_task(None)
    write_idx_folder(tmp_path)
    with pytest.raises(ConfigError, match="at most 60 users"):
        idx_task(tmp_path, population=61)
    with pytest.raises(ConfigError, match=r"population\.size: missing; the images are dealt"):
        idx_task(tmp_path, population=None)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((20, 8, 9))))
    with pytest.raises(ConfigError, match="the train images are 8 x 8, the t10k images 8 x 9"):
        idx_task(tmp_path)
    with pytest.raises(ConfigError, match="'cnn' needs images of at least 4 x 4, got 3 x 3; use 'resnet18'"):
        idx_task(write_idx_folder(tmp_path, side=3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": 12}, "classes goes with data = 'idx' only; leave it out"),
        ({"data": "idx", "held_out": 0.3}, "held_out goes with data = 'digits' only"),
        ({"model": "resnet18", "channels": 8}, "channels goes with model = 'cnn' only"),
        ({"model": "resnet18", "hidden": 8}, "hidden goes with model = 'cnn' only"),
        ({"model": "resnet"}, "task.model: input should be 'cnn' or 'resnet18'; got 'resnet'"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        validate(VisionOptions, {"name": "vision", **options}, "task")


def test_written_defaults_are_no_options_that_do_nothing():
    for options in ({"data": "idx"}, {"model": "resnet18"}):
        full = VisionOptions(name="vision", **options)
        assert VisionOptions(**full.model_dump()) == full


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
