"""An experiment file: its sections, how it is read, overridden, checked and named. Imports no PyTorch."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from fedclip.asr.options import AsrOptions
from fedclip.choices import NoiseSplit
from fedclip.options import ConfigError, Options, check_arguments, unknown, validate
from fedclip.stages import Rate, check_stage, local_sgd
from fedclip.tasks.vision_options import VisionOptions


class RunOptions(Options):
    """What is run, where, and on what."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    rounds: Annotated[int, Field(ge=1)]
    out: Path | None = None
    """The run folder, which must not hold a run yet; by default `runs/NAME-DATE-TIME`."""
    data_dir: Path | None = None
    """Folder of the data, read in place."""
    init_from: Path | None = None
    """A model or a run folder whose weights the run begins with; by default the weights are drawn."""
    init_digest: str | None = None
    """What `init_from` held: written into the resolved configuration, since it changes the result."""
    engine: Literal["ray", "process"] = "ray"
    """`ray`: Flower messages to Ray actors; `process`: everything in this process. The result has the same bits."""
    reply: Literal["sums", "updates"] = "sums"
    """What a worker replies in a simulation: the exact sum over its users, or each user's encoded update as a device would."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Worker processes; 0: one for each core of this machine."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    """Where the numbers of the run are shown, besides TensorBoard; each an extra of its name."""


class PopulationOptions(Options):
    """The users there are; without a size, all that the data has."""

    size: Annotated[int, Field(ge=1, le=100_000_000)] | None = None


class SamplerOptions(Options):
    """How a cohort is drawn.

    `poisson`: each user independently with probability cohort / population; a cohort as large as the population is everybody.
    `fixed_size`: always as many, which costs more privacy. `available`: whoever of real devices is there, each by a coin of its own,
    `cohort` being what the sum is divided by; no privacy is claimed of that.
    """

    name: Literal["poisson", "fixed_size", "available"] = "poisson"
    cohort: Annotated[float, Field(gt=0)]
    max_cohort: Annotated[int, Field(ge=1)] | None = None
    """`poisson` only: when more come, so many of them take part, drawn at random."""
    devices_per_user: Annotated[int, Field(ge=1)] = 1
    """`poisson` only: how many of the ids one person may hold; the guarantee is then for all of a person's ids together."""

    over_selection: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """`available` only: so many times the cohort are asked, at most all, since some do not answer."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.name != "available" and self.over_selection != 1:
            raise ValueError(f"over_selection goes with the sampler available only, got {self.name}")
        if self.name == "fixed_size" and self.cohort != int(self.cohort):
            raise ValueError(f"expected a whole number for sampler.cohort with fixed_size, got {self.cohort}")
        if self.name != "poisson" and (self.max_cohort is not None or self.devices_per_user > 1):
            raise ValueError("max_cohort and devices_per_user go with the sampler poisson only")
        return self


class StrategyOptions(Options):
    """A published method with its arguments, or the stages themselves."""

    model_config = ConfigDict(extra="allow", frozen=True)
    method: str = "stages"


class PrivacyOptions(Options):
    """Noise on the sum. Without a noise multiplier or a target there is none."""

    noise_multiplier: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """z: the noise on the sum has a standard deviation of z times the bound on a user's update."""
    target_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """In the place of a noise multiplier: the smallest one that keeps all rounds within this epsilon, which is also the budget."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-9
    """Delta of every epsilon; well under one over the population."""
    epsilon_budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The run ends before a round that would exceed it."""
    noise_cohort_size: Annotated[float, Field(gt=0)] | None = None
    """S': the noise multiplier is that of a cohort of S', and the noise on the mean is the one that such a cohort would have. The epsilon
    of S' is stated beside that of this run, as extrapolated."""
    noise_population: Annotated[int, Field(ge=1)] | None = None
    """The population that the cohort of S' would be drawn from; by default that of this run."""
    layer_noise: NoiseSplit = "isotropic"
    """The same noise on all coordinates, or by layer: in proportion to the layers' `bounds`, or to `layer_noise_weights`."""
    layer_noise_weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.noise_multiplier is not None and self.target_epsilon is not None:
            raise ValueError("expected noise_multiplier or target_epsilon, got both; the one is calibrated to the other")
        said = self.model_dump(exclude_defaults=True, exclude={"delta"})
        if said and self.noise_multiplier is None and self.target_epsilon is None:
            raise ValueError(f"{', '.join(said)} without noise; give noise_multiplier or target_epsilon")
        if self.noise_population is not None and self.noise_cohort_size is None:
            raise ValueError("noise_population goes with noise_cohort_size")
        return self


class CodecOptions(Options):
    """The wire format of updates and of the model, with its arguments: one that ships, or a class of one's own by a door."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = "dense"


CODECS = ("dense", "packed")
"""The wire formats that ship."""


class StatesOptions(Options):
    """How what the client chain remembers of users is kept between rounds."""

    precision: Literal["float32", "float16"] = "float32"
    """float16 takes half of the room, and rounds: 11 bits of each value but the tiny ones."""


class DownlinkOptions(Options):
    """How the model goes down: through lossy stages, whole in each round or as the difference to what clients have."""

    stages: tuple[dict[str, Any], ...] = ()
    differences: bool = False


class EvaluationOptions(Options):
    """When the model is tried on held-out users: every so many rounds and after the last; 0: after the last only."""

    every: Annotated[int, Field(ge=0)] = 10
    on: Literal["server", "devices"] = "server"
    """`devices`: in a deployment, each on what it holds out of its own data. Under noise the mean of the users' rates is released with
    noise, which counts as one more release of the account."""


class CentralOptions(Options):
    """The central baseline of `fedclip train-central`: the same users' batches in the same order, one optimizer step each.

    Gradients are clipped, accumulated and computed as `[local]` says; the rate may be a schedule by round.
    """

    optimizer: Literal["adam", "sgd", "adamw", "lamb"] = "adam"
    lr: Rate = 1e-3
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """`adamw` and `lamb` only."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.weight_decay and self.optimizer not in ("adamw", "lamb"):
            raise ValueError(f"expected central.weight_decay with the optimizers adamw and lamb only, got {self.optimizer}")
        return self


class RayOptions(Options):
    """The Ray cluster and what a worker takes of it."""

    address: str | None = None
    """Address of a running cluster; None starts Ray on this machine for the run."""
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    messages_per_worker: Annotated[int, Field(ge=1)] = 1
    """In a round. With more than one, who is done early takes the next, and less is lost with a worker; each costs a sum to send."""
    deadline_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """A worker that takes longer over one message counts as hung, and is replaced; twice as long each time the message is done again.
    None: any time."""
    retries: Annotated[int, Field(ge=0)] = 2
    """So often a message whose worker was lost is done again, before the run ends with an error."""


class DeploymentOptions(Options):
    """Real devices in the place of a simulation: `flwr run` on a SuperLink, with a SuperNode each."""

    roster: Path
    """Who may take part: names, keys and users of the nodes; `fedclip keys enroll` writes it. Read again each round."""
    deadline_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Whoever has not answered by then is left out of the round."""
    least_users: Annotated[int, Field(ge=1)] = 1
    """A round begins when users enough are there. Without noise it counts when as many have answered, else it is done again; under noise
    it always counts, divided by the same cohort and with the same noise, since to leave it out would tell who was there."""
    users_per_message: Annotated[int, Field(ge=1)] = 8
    """Updates that a node sends together: what the server holds at a time."""
    seeded: bool = False
    """Take all randomness from `run.seed`, as a simulation does, so that it can be repeated: epsilon is nominal then, and says so."""
    diagnostics: bool = False
    """Let clients say what they measured, and show cohorts, losses and bytes under noise too: these are not private, and every report
    says so."""
    insecure: bool = False
    """Take nodes at their word: no keys, no signatures, on a SuperLink without TLS. Every report says so."""


class DoorOptions(Options):
    """A user's own task: `name = "module:factory"` or `"file.py:factory"`.

    The factory is called with `population`, `data_dir` and `seed` by name, and with `arguments`; it returns a `Task`.
    """

    name: Annotated[str, Field(pattern=r".+:.+")]
    arguments: dict[str, Any] = Field(default_factory=dict)


def _kind_of_task(values: Any) -> str:
    name = values.get("name") if isinstance(values, Mapping) else getattr(values, "name", None)
    return "door" if isinstance(name, str) and ":" in name else str(name)


TaskOptions = Annotated[
    Annotated[AsrOptions, Tag("asr")] | Annotated[VisionOptions, Tag("vision")] | Annotated[DoorOptions, Tag("door")],
    Discriminator(_kind_of_task),
]


class Experiment(Options):
    """A whole experiment file."""

    run: RunOptions
    task: TaskOptions
    population: PopulationOptions = PopulationOptions()
    sampler: SamplerOptions
    local: dict[str, Any]
    strategy: StrategyOptions = StrategyOptions()
    privacy: PrivacyOptions = PrivacyOptions()
    codec: CodecOptions = CodecOptions()
    downlink: DownlinkOptions = DownlinkOptions()
    states: StatesOptions = StatesOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    central: CentralOptions = CentralOptions()
    ray: RayOptions = RayOptions()
    deployment: DeploymentOptions | None = None

    def plain(self) -> dict[str, Any]:
        """Return the sections as plain values (strings, numbers, lists, tables), without what is None."""
        plain: dict[str, Any] = json.loads(json.dumps(self.model_dump(exclude_none=True), default=str))
        return plain


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of a TOML file with some keys set anew.

    Args:
        path: the file.
        overrides: `"section.key=value"`, the value in TOML (a bare word is a string). A stage in a list is addressed by its name:
            `strategy.client.clip_per_layer.max_norm=0.02`.

    Raises:
        ConfigError: no such file, not TOML, an unknown key or a value that is not allowed.
    """
    values = read_toml(path)
    if "base" in values and "task" not in values:
        raise ConfigError(f"{path} is a sweep; try its experiments by: fedclip sweep {path}")
    for override in overrides:
        set_key(values, *read_override(override))
    return make_experiment(values)


def read_toml(path: Path) -> dict[str, Any]:
    """Return what an experiment or sweep file says.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"No such experiment file: {path}; see the files in the folder experiments.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from None


def apply_overrides(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """Return an experiment with some keys set anew, as `load_experiment` does."""
    values = experiment.plain()
    for override in overrides:
        set_key(values, *read_override(override))
    return make_experiment(values)


def make_experiment(values: Mapping[str, Any]) -> Experiment:
    """Return a checked experiment of plain values.

    Raises:
        ConfigError: an unknown key or a value that is not allowed.
    """
    name = values.get("task", {}).get("name") if isinstance(values.get("task"), Mapping) else None
    if isinstance(name, str) and ":" not in name and name not in ("asr", "vision"):
        raise unknown("task.name", name, ("asr", "vision", "module:factory", "file.py:factory"), "task")
    experiment = validate(Experiment, values)
    check_arguments(local_sgd, experiment.local, "local")
    for side in ("client", "server"):
        stages = getattr(experiment.strategy, side, [])
        if not isinstance(stages, list | tuple):
            raise ConfigError(f"strategy.{side}: expected a list of stages, [{{ name = {{ argument = value }} }}, …]; got {stages!r}.")
        for stage in stages:
            check_stage(stage, f"strategy.{side}")
    if ":" not in experiment.codec.name and experiment.codec.name not in CODECS:
        raise unknown("codec.name", experiment.codec.name, (*CODECS, "module:factory", "file.py:factory"), "codec")
    check_stage(codec_stage(experiment), "codec")
    for stage in experiment.downlink.stages:
        check_stage(stage, "downlink.stages")
    _check_deployment(experiment)
    size = experiment.population.size
    if size is not None and experiment.sampler.cohort > size:
        raise ConfigError(f"sampler.cohort: expected at most population.size = {size}, got {experiment.sampler.cohort:g}.")
    return experiment


def _check_deployment(experiment: Experiment) -> None:
    if experiment.deployment is None:
        if experiment.evaluation.on == "devices":
            raise ConfigError("evaluation.on: 'devices' needs a section [deployment]; a simulation evaluates on held-out users.")
        return
    if experiment.sampler.name != "available":
        raise ConfigError(
            f"sampler.name: a deployment asks whoever is there, which is no '{experiment.sampler.name}' sampling; set it to 'available'."
        )
    if experiment.downlink.differences:
        raise ConfigError("downlink.differences: devices are sent the whole model; leave it out, and keep the stages.")


def codec_stage(experiment: Experiment) -> dict[str, Any]:
    """Return the wire format of an experiment as a stage."""
    return {experiment.codec.name: dict(experiment.codec.model_extra or {})}


def read_override(override: str) -> tuple[str, Any]:
    """Return the key and the value of `"section.key=value"`, the value in TOML; a bare word is a string.

    Raises:
        ConfigError: it has no key or no value.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"Expected --set section.key=value, got '{override}'.")
    try:
        return key.strip(), tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text.strip()


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of plain values, in place; a stage in a list is addressed by its name.

    Raises:
        ConfigError: there is no such stage, or what is above the key is no section.
    """
    place = _above(values, key)
    place[key.rpartition(".")[2]] = value


def drop_key(values: dict[str, Any], key: str) -> None:
    """Take a dotted key out of plain values, in place, so that its default stands. Raises as `set_key`."""
    _above(values, key).pop(key.rpartition(".")[2], None)


def _above(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the section that a dotted key is in, made where it is not there."""
    path = key.split(".")
    place: Any = values
    for part in path[:-1]:
        if isinstance(place, list):
            named = [item for item in place if isinstance(item, dict) and part in item]
            if not named:
                raise ConfigError(
                    f"{key}: no stage '{part}' in the list; it has {[next(iter(i), '') for i in place if isinstance(i, dict)]}."
                )
            place = named[0][part]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise ConfigError(f"{key}: '{part}' is no section, its value is {place!r}.")
    if not isinstance(place, dict):
        raise ConfigError(f"{key}: expected a section above '{path[-1]}', got {place!r}.")
    return place
