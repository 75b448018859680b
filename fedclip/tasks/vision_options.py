"""The `[task]` section of image classification. Imports no PyTorch."""

from typing import Annotated, Literal

from pydantic import Field

from fedclip.options import Options


class VisionOptions(Options):
    """scikit-learn's digits (1,797 images of 8 x 8, ten classes), dealt to users by a Dirichlet distribution over classes."""

    name: Literal["vision"]
    alpha: Annotated[float, Field(gt=0)] = 0.5
    """Concentration of the Dirichlet distribution: small: each user has few classes; large: all users are alike."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the images that nobody trains on."""
    channels: Annotated[int, Field(ge=1)] = 16
    """Channels of the first convolution; the second has twice as many."""
