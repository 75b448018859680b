"""The central baseline: it goes on with the same bits after it was stopped, and its model begins a federated run."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.central import Central
from experiments.cli import app
from experiments.prepare import prepare, read_experiment
from experiments.run import Run
from fedclip.model_file import flatten, load_model
from tests.experiments.test_resume import run, same

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.05),
    "sgd": torch.optim.SGD,
}


def central(vision: Path, out: Path, *more: str) -> list[str]:
    return ["train-central", str(vision), "--out", str(out), "--set", "evaluation.every=2", "--quiet", *more]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_has_the_bits_of_torchs_optimizer(vision: Path, optimizer: str) -> None:
    decay = ["central.weight_decay=0.05"] if optimizer == "adamw" else []
    prepared = prepare(read_experiment(vision, [f"central.optimizer={optimizer}", *decay]))
    engine, reference = Central(prepared), Central(prepared)
    replica = reference._site.replica
    flat = torch.nn.Parameter(replica.params, requires_grad=False)
    torchs = OPTIMIZERS[optimizer]([flat], lr=1e-3)

    class Torchs:
        state = None

        def step(self, lr: float) -> None:
            flat.grad = replica.grads
            torchs.step()

    reference._optimizer = Torchs()  # type: ignore[assignment]
    for _ in range(2):
        engine.round()
        reference.round()
    assert torch.equal(engine.state.params, reference.state.params)


def test_rounds_stopped_and_gone_on_with_have_the_same_bits(vision: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    options = ["--set", "central.optimizer=lamb", "--set", "central.lr={value=0.01, decay='step', start=2, every=1}"]
    assert run(*central(vision, once, *options, "--rounds", "5"))[0] == 0
    assert run(*central(vision, twice, *options, "--rounds", "3"))[0] == 0
    status, output = run("train-central", "--resume", twice, "--rounds", "5")
    assert status == 0, output
    assert same(once, twice)
    lines = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (once, twice)]
    assert [r["train_loss"] for r in lines[0]] == [r["train_loss"] for r in lines[1]]
    # The first five rounds of a longer run, without evaluations, are a run of five.
    engine = Central(prepare(read_experiment(vision, [*options[1::2], "run.rounds=100"])))
    for _ in range(5):
        engine.round()
    assert torch.equal(engine.state.params, flatten(load_model(once / "checkpoints" / "model.safetensors")[1], engine.layout))


def test_a_kill_in_the_middle_of_a_round_leaves_the_round_before(vision: Path, tmp_path: Path) -> None:
    """Some users of the round have moved the parameters and the moments already; the checkpoint knows nothing of it."""
    experiment = read_experiment(vision, ["run.rounds=4"])
    whole = Central(prepare(experiment))
    for _ in range(4):
        whole.round()

    class Killed(BaseException):
        pass

    class Reporter:
        def round(self, row: object, seconds: float) -> None:
            engine._optimizer.step = kill  # type: ignore[method-assign]

    steps = []

    def kill(lr: float) -> None:
        steps.append(lr)
        type(engine._optimizer).step(engine._optimizer, lr)
        if len(steps) == 5:
            raise Killed

    engine = Central(prepare(experiment))
    first = Run(prepare(experiment), engine, tmp_path / "run")
    with pytest.raises(Killed):
        first.rounds(Reporter())  # type: ignore[arg-type]
    first.folder.close()
    assert engine.state.round == 1

    again = Central(prepare(experiment, resume=True))
    second = Run(prepare(experiment, resume=True), again, tmp_path / "run", resume=True)
    assert again.state.round == 1
    second.rounds(type("Quiet", (), {"round": lambda *_: None})())
    second.folder.close()
    assert torch.equal(again.state.params, whole.state.params)
    assert torch.equal(again.state.server.second, whole.state.server.second)


def test_a_federated_run_begins_with_the_model_that_was_trained_centrally(vision: Path, tmp_path: Path) -> None:
    seed, out = tmp_path / "seed", tmp_path / "run"
    assert run(*central(vision, seed, "--rounds", "2"))[0] == 0
    assert (seed / "report.html").is_file()
    options = ["--set", f"run.init_from={seed}", "--set", "run.engine=process", "--set", "evaluation.every=1", "--quiet"]
    assert run("run", vision, "--out", out, "--rounds", "1", *options, "--set", "strategy.server_lr=1e-9")[0] == 0
    accuracy = [json.loads((p / "summary.json").read_text())["accuracy"] for p in (seed, out)]
    assert accuracy[0] == accuracy[1], "a server step of next to nothing leaves the model that it began with"
    drawn = tmp_path / "drawn"
    assert run("run", vision, "--out", drawn, "--rounds", "1", *options[2:], "--set", "strategy.server_lr=1e-9")[0] == 0
    assert not same(out, drawn)


def test_each_command_goes_on_with_its_own_runs(vision: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "central", tmp_path / "federated"
    assert run(*central(vision, one, "--rounds", "1"))[0] == 0
    assert run("run", vision, "--out", other, "--rounds", "1", "--set", "run.engine=process", "--quiet")[0] == 0
    for command, folder, maker in (("run", one, "train-central"), ("train-central", other, "run")):
        status, output = run(command, "--resume", folder)
        assert status == 2
        assert f"was made by fedclip {maker}; go on with it by fedclip {maker} --resume" in output
    status, output = run("train-central", "--resume", one, "--set", "central.lr=0.5")
    assert status == 2
    assert "central.lr was 0.001" in output
    assert CliRunner().invoke(app, ["train-central"]).exit_code == 2


def test_decay_goes_with_the_optimizers_that_have_it(vision: Path) -> None:
    status, output = run("train-central", vision, "--set", "central.weight_decay=0.1")
    assert status == 2
    assert "adamw and lamb only, got adam" in output
