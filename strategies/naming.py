"""`run_digest`: the name of a run in its random streams. Imports no PyTorch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fedclip.asr.model_options import AnyModelOptions, ModelDoorOptions
from fedclip.asr.options import AsrOptions
from fedclip.config import DownlinkOptions, Experiment, StatesOptions
from fedclip.options import without_defaults
from fedclip.stages import local_sgd
from strategies.privacy import noise_multiplier
from strategies.recipes import OTHER_SECTIONS, RECIPES


def run_digest(experiment: Experiment) -> str:
    """Name a run: a hash of the seed and of all that changes the parameters that come out.

    Rounds, workers, engine, reply mode, paths, the lossless codec, evaluation, the decoder and the central baseline do not. A value
    that is the default counts as if it were not said, so that an option that a later version adds leaves the name, and with it every
    random stream, as it was.
    """
    said = experiment.model_dump(exclude_defaults=True)
    said = {section: said.get(section, {}) for section in ("task", "population", "sampler", "privacy")} | {"codec": {}}
    said["privacy"] = (
        said["privacy"]
        if noise_multiplier(experiment) is None
        else {"noise_multiplier": noise_multiplier(experiment)}
        | {key: value for key, value in said["privacy"].items() if key.startswith("layer_noise")}
    )
    said["task"]["name"] = Path(experiment.task.name).name  # of a user's own file without the folder that it lies in
    if "corpus" in said["task"]:
        said["task"]["corpus"]["kind"] = experiment.task.corpus.kind  # type: ignore[union-attr]
    if isinstance(experiment.task, AsrOptions):
        said["task"] |= _named_model(experiment.task.model, said["task"].get("model", {}))
    said["task"] = {key: value for key, value in said["task"].items() if key not in ("cache_dir", "cache_mb", "decoder")}
    method, arguments = experiment.strategy.method, experiment.strategy.model_extra or {}
    said["strategy"] = {method: without_defaults(RECIPES[method], arguments, "strategy", dict.fromkeys(OTHER_SECTIONS))}
    said["local"] = without_defaults(local_sgd, experiment.local, "local")
    if experiment.downlink != DownlinkOptions():
        said["downlink"] = experiment.downlink.model_dump()
    if experiment.states != StatesOptions():
        said["states"] = experiment.states.model_dump()
    said["seed"] = experiment.run.seed
    if experiment.run.init_digest is not None:
        said["init"] = experiment.run.init_digest
    return hashlib.blake2b(json.dumps(said, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _named_model(model: AnyModelOptions, said: dict[str, Any]) -> dict[str, Any]:
    """Return what a model section says with its kind where that is no default, and frozen weights by their digest, not their place."""
    said = {key: value for key, value in said.items() if key != "path"}
    if isinstance(said.get("adapters"), dict):
        said["adapters"] = {key: value for key, value in said["adapters"].items() if key != "base"}
    if isinstance(model, ModelDoorOptions):
        said["name"] = Path(model.name).name
    if model.kind != "transformer":
        said["kind"] = model.kind
    return {"model": said} if said else {}
