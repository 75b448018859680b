"""What `[task.model]` may say: the kind of model, its sizes, and adapters. Checked values only: imports no PyTorch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from fedclip.options import Options

CONFORMER_TARGETS = ("*.ffn1.*", "*.ffn2.*", "*.self_attn.out_proj")
"""All linear layers of torchaudio's Conformer blocks: its queries, keys and values are a matrix of the attention, and no layer."""


class AdapterOptions(Options):
    """Low-rank adapters (LoRA, arXiv 2106.09685): the model is frozen, and what is trained is small.

    Names are patterns as of files (`*` stands for anything, dots too).
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0.0, allow_inf_nan=False)
    """What an adapter adds is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """The linear layers that get one. None: queries and values, as in the paper (those of `transformer` are one layer with the keys).

    Of a `conformer`, whose queries and values are no layers of their own: all linear layers of its blocks.
    """
    trained: tuple[str, ...] = ("output",)
    """Modules and tensors that are trained whole, the CTC output among them."""
    base: Path | None = None
    """A model or a run folder with the frozen weights. A `pretrained` model has its own; one by a door may have."""
    digest: str | None = None
    """What `base` held: written into the resolved configuration, since it changes the result."""


class ModelOptions(Options):
    """The CTC transformer: by default one that learns in minutes on a processor.

    The 255.8 M model of arXiv 2310.00098 is in `experiments/pfl4asr.toml`.
    """

    kind: Literal["transformer"] = "transformer"
    dim: int = Field(default=128, ge=4)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=2, ge=1)
    mlp_dim: int = Field(default=512, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    layer_drop: float = Field(default=0.0, ge=0.0, lt=1.0)
    kernel: int = Field(default=15, ge=1)
    convolutions: int = Field(default=0, ge=0)
    """Further convolutions of the front end, each over 3 frames with a residual path: local context that attention need not learn."""
    stride: int = Field(default=4, ge=1, le=16)
    norm: Literal["pre", "post"] = "pre"
    shift_seconds: float = Field(default=0.0, ge=0.0)
    """Positions move by up to this much, either way, in training (CAPE), so that no absolute time is learnt.

    With it a model takes utterances longer than any it was trained on, and needs more steps to learn its first words."""
    adapters: AdapterOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"Expected an even dim divisible by heads, got dim {self.dim} and heads {self.heads}.")
        _check_front(self.kernel, self.stride)
        _check_base(self.adapters)
        return self


class ConformerOptions(Options):
    """The Conformer (arXiv 2005.08100) of torchaudio behind a strided convolution with GLU.

    The defaults are the sizes of Conformer (S), which has 16 layers.
    """

    kind: Literal["conformer"] = "conformer"
    dim: int = Field(default=144, ge=4)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    mlp_dim: int = Field(default=576, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    depthwise_kernel: int = Field(default=31, ge=1)
    """Frames under the convolution of each block."""
    kernel: int = Field(default=7, ge=1)
    stride: int = Field(default=4, ge=1, le=16)
    adapters: AdapterOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"Expected dim divisible by heads, got dim {self.dim} and heads {self.heads}.")
        if self.depthwise_kernel % 2 == 0:
            raise ValueError(f"Expected an odd depthwise_kernel, so that a frame is centred on its input; got {self.depthwise_kernel}.")
        _check_front(self.kernel, self.stride)
        _check_base(self.adapters)
        return self


class PretrainedOptions(Options):
    """The encoder of a pretrained model in a folder of this machine (wav2vec 2.0, HuBERT, WavLM, Whisper), frozen, with adapters.

    The folder holds `config.json` and weights in safetensors, as `save_pretrained` of the library transformers writes them.
    """

    kind: Literal["pretrained"] = "pretrained"
    path: Path
    digest: str | None = None
    """What the folder held: written into the resolved configuration, since it changes the result."""
    adapters: AdapterOptions = AdapterOptions()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.adapters.base is not None:
            raise ValueError("Expected no adapters.base with a pretrained model, whose frozen weights lie in path.")
        return self


class ModelDoorOptions(Options):
    """A user's own model: `name = "module:factory"` or `"file.py:factory"`.

    The factory is called with `width` (features of a frame), `symbols` and `seed` by name, and with `arguments`; it returns a
    `Module(features, lengths) -> (logits, frames)`, with the same weights at each call. With a method `output_lengths(lengths)`,
    utterances that have too few frames for their text are left out, and counted.
    """

    kind: Literal["door"] = "door"
    name: Annotated[str, Field(pattern=r".+:.+")]
    arguments: dict[str, Any] = Field(default_factory=dict)
    adapters: AdapterOptions | None = None


def _check_front(kernel: int, stride: int) -> None:
    if kernel % 2 == 0:
        raise ValueError(f"Expected an odd kernel, so that a frame is centred on its input; got {kernel}.")
    if stride > kernel:
        raise ValueError(f"Expected stride <= kernel, or features between frames are lost; got {stride} > {kernel}.")


def _check_base(adapters: AdapterOptions | None) -> None:
    if adapters is not None and adapters.base is None:
        raise ValueError("Expected adapters.base, a trained model; adapters of weights that were never trained learn nothing.")


def _kind_of_model(values: Any) -> str:
    if isinstance(values, Mapping):
        return str(values.get("kind", "door" if "name" in values else "transformer"))
    return str(getattr(values, "kind", "transformer"))


AnyModelOptions = Annotated[
    Annotated[ModelOptions, Tag("transformer")]
    | Annotated[ConformerOptions, Tag("conformer")]
    | Annotated[PretrainedOptions, Tag("pretrained")]
    | Annotated[ModelDoorOptions, Tag("door")],
    Discriminator(_kind_of_model),
]
"""Any model section; its `kind` says which, and a `name` alone says `door`."""
