"""ResNet-18 (arXiv 1512.03385) with GroupNorm (arXiv 1803.08494) in the place of BatchNorm: no statistics travel between users."""

from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

GROUPS: Final = 32
"""Groups of a normalisation."""

STAGES: Final = ((64, 1), (128, 2), (256, 2), (512, 2))
"""Channels and stride of each stage of two blocks."""


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and what goes around them.

    Images (batch, entering, height, width) become (batch, leaving, height / stride, width / stride), rounded up.
    """

    def __init__(self, entering: int, leaving: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(GROUPS, leaving)
        self.conv2 = nn.Conv2d(leaving, leaving, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(GROUPS, leaving)
        around = nn.Sequential(nn.Conv2d(entering, leaving, 1, stride, bias=False), nn.GroupNorm(GROUPS, leaving))
        self.around = around if stride > 1 or entering != leaving else nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the sum of both ways."""
        x = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(x)) + self.around(images))


class ResNet18(nn.Module):
    """Images (batch, channels, height, width) to scores (batch, classes).

    The stem is a 3 x 3 convolution with stride 1 and no pooling, as for images of 28 x 28 or 32 x 32.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        entering = STAGES[0][0]
        self.stem = nn.Conv2d(channels, entering, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, entering)
        self.blocks = nn.Sequential()
        for leaving, stride in STAGES:
            self.blocks.extend([BasicBlock(entering, leaving, stride), BasicBlock(leaving, leaving, 1)])
            entering = leaving
        self.out = nn.Linear(entering, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return unnormalised scores."""
        x = self.blocks(F.relu(self.norm(self.stem(images))))
        scores: torch.Tensor = self.out(x.mean((2, 3)))
        return scores
