"""Run folders with known numbers, for tests of reports."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import tomli_w

from fedclip.accounting import Guarantee

LAYERS = ("net.0.weight", "net.0.bias", "net.1.weight")


def run_folder(
    path: Path,
    *,
    error: float = 0.2,
    up: int = 1000,
    seed: int = 1,
    rounds: int = 6,
    rate: str = "wer",
    noise: float | None = None,
    ended: bool = True,
    layers: tuple[str, ...] = LAYERS,
    extrapolated: bool = False,
    settings: dict[str, dict[str, Any]] | None = None,
) -> Path:
    """Write the folder of a run whose error rate falls to `error` at its last round; evaluated each second round."""
    (path / "checkpoints").mkdir(parents=True)
    rows = [row_of(n, error + 0.05 * (rounds - n), up, rate, noise, len(layers), evaluated=n % 2 == 0) for n in range(1, rounds + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {"run": {"name": "x", "seed": seed, "rounds": rounds, "out": str(path)}, "task": {"name": "asr"}}
    config |= {"population": {"size": 500}, "strategy": {"method": "fedopt", "client": [{"clip_per_layer": {"max_norm": 0.5}}]}}
    config |= {"privacy": {"noise_multiplier": noise}} if noise is not None else {}
    for section, values in (settings or {}).items():
        config[section] = config.get(section, {}) | values
    (path / "config.toml").write_text(tomli_w.dumps(config))
    (path / "environment.json").write_text(json.dumps({"command": "run"}))
    header = json.dumps({"__metadata__": {"tensors": json.dumps(layers)}}).encode()
    (path / "checkpoints" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    if rate == "wer":
        speakers = [{"unit": n, "words": 10, "wer": (n * 7 % 11) / 10 * error} for n in range(12)]
        (path / "speakers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in speakers))
    if ended:
        summary: dict[str, Any] = {"status": "done", "rounds": rounds, "both_ways_ratio": 3.5} | rows[-1]
        if noise is not None:
            summary |= {"privacy": "seeded simulation: epsilon is nominal", "measured": said_of(rows[-1]["epsilon"])}
        if extrapolated:
            summary["extrapolated"] = said_of(0.25) | {"extrapolated": True}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def said_of(epsilon: float | None) -> dict[str, Any]:
    """Return what a summary says of an epsilon."""
    return Guarantee(math.inf, 1e-9, "add-or-remove-one", "user", "Poisson", "pld", 0.01, 1.0, 3).plain() | {"epsilon": epsilon}


def row_of(n: int, error: float, up: int, rate: str, noise: float | None, layers: int, *, evaluated: bool) -> dict[str, Any]:
    """Return a line of `metrics.jsonl`."""
    row: dict[str, Any] = {"round": n, "attempt": 0, "train_loss": 3 / n, "users": 10 + n, "failed_users": 0}
    row |= {"uplink_bytes": up * n, "downlink_bytes": 3000, "users_per_second": 20.0, "round_seconds": 0.5 * n}
    row["layer_clipped"] = [((n + h) % 5) / 4 for h in range(layers)]
    row["layer_norm"] = [0.01 * 10**h / n for h in range(layers)]
    row["layer_sparsity"] = [0.9 - 0.1 / (n + h) for h in range(layers)]
    if noise is not None:
        row |= {"epsilon": n / noise, "delta": 1e-6, "layer_snr": [1 + 1 / (n + h) for h in range(layers)]}
    if evaluated:
        value = error if rate == "wer" else 1 - error
        row |= {"eval_loss": 2 / n, rate: value, f"{rate}_low": value - 0.03, f"{rate}_high": value + 0.02, "evaluated_round": n}
        row |= {"wer_speakers_median": error, "wer_worst_decile": 2 * error} if rate == "wer" else {}
    return row


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


CASES = (("dense", 0.2, 1000), ("int8", 0.25, 250))
"""Cases of a sweep: name, error, bytes up."""


def sweep_folder(path: Path, cases: tuple[tuple[str, float, int], ...] = CASES, noises: tuple[float | None, ...] = (None,)) -> Path:
    """Write a sweep of cases by levels of noise by two seeds, and one trial that waits."""
    path.mkdir()
    trials = []
    for case, error, up in cases:
        for noise, seed in product(noises, (1, 2)):
            name = f"{case}-seed={seed}" if noise is None else f"{case}-noise={noise}-seed={seed}"
            privacy = {} if noise is None else {"noise_cohort_size": 2000}
            said = {"codec": {"name": case}, "privacy": privacy}
            run_folder(path / "trials" / name, error=error + 0.02 * seed, up=up, seed=seed, noise=noise, settings=said)
            settings = {"codec.name": case, "run.seed": seed}
            settings |= {} if noise is None else {"privacy.noise_cohort_size": 2000, "privacy.noise_multiplier": noise}
            trials.append({"name": name, "folder": f"trials/{name}", "settings": settings, "case": case, "seed": seed, "status": "done"})
    late = {"name": "dense-seed=3", "folder": "trials/late", "settings": {"codec.name": "dense", "run.seed": 3}, "case": "dense"}
    trials.append(late | {"seed": 3, "status": "waiting", "error": ""})
    sweep = {"name": "both", "base": "x.toml", "note": "Tuning costs privacy.", "keys": ["codec.name"], "trials": trials}
    (path / "sweep.json").write_text(json.dumps(sweep))
    return path
