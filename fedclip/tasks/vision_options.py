"""The `[task]` section of image classification. Imports no PyTorch."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedclip.options import Options
from fedclip.tasks.partition_options import PartitionOptions


class VisionOptions(Options):
    """Labelled images, dealt to users by a Dirichlet distribution over classes, or by a partition."""

    name: Literal["vision"]
    data: Literal["digits", "idx"] = "digits"
    """`digits`: scikit-learn's (1,797 images of 8 x 8, ten classes); `idx`: files in the data folder, as MNIST and Fashion-MNIST."""
    classes: Annotated[int, Field(ge=2, le=256)] = 10
    """`idx` only: labels are 0 .. classes - 1."""
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Concentration of the Dirichlet distribution: small: each user has few classes; large: all users are alike."""
    partition: PartitionOptions | None = None
    """In the place of `alpha`: a partition of flwr-datasets."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """`digits` only: fraction of the images that nobody trains on. Of idx files these are the t10k images."""
    model: Literal["cnn", "resnet18"] = "cnn"
    """`cnn`: two convolutions; `resnet18`: ResNet-18 with GroupNorm, about 11.2 million parameters."""
    channels: Annotated[int, Field(ge=1)] = 16
    """`cnn` only: channels of the first convolution; the second has twice as many."""
    hidden: Annotated[int, Field(ge=0)] = 0
    """`cnn` only: width of a linear layer before the last one; 0: none."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        said = self.model_dump(exclude_defaults=True)
        for key, option, value in (
            ("classes", "data", "idx"),
            ("held_out", "data", "digits"),
            ("channels", "model", "cnn"),
            ("hidden", "model", "cnn"),
        ):
            if key in said and getattr(self, option) != value:
                raise ValueError(f"{key} goes with {option} = '{value}' only; leave it out")
        if self.partition is not None and "alpha" in said:
            raise ValueError("alpha goes without partition only; a partition by a Dirichlet distribution has its own partition.alpha")
        return self
