"""ConvNeXt under the names of KernelWarehouse's published files, with channels first throughout."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

EPSILON = 1e-6


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of maps, (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x, normalised at each position by itself."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A depth-wise 7x7 convolution, and two 1x1 ones with four times the width between them, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((1, width, 1, 1), 1e-6))
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = ChannelNorm(width, eps=EPSILON)
        self.pwconv1 = nn.Conv2d(width, 4 * width, 1)
        self.pwconv2 = nn.Conv2d(4 * width, width, 1)
        self.drop_path = StochasticDepth(0.0, "row")

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the same shape."""
        branch = self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.drop_path(self.gamma * branch)


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al., CVPR 2022): four stages at a 4th to a 32nd of the resolution, and a classifier.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
        num_classes: outputs of the classifier.
        dropout: share dropped before it.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], num_classes: int, dropout: float) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0], eps=EPSILON))
        narrowing = [
            nn.Sequential(ChannelNorm(before, eps=EPSILON), nn.Conv2d(before, after, 2, 2))
            for before, after in itertools.pairwise(widths)
        ]
        self.downsample_layers = nn.ModuleList([stem, *narrowing])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width) for _ in range(depth))) for depth, width in zip(depths, widths, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (B, num_classes), of images, (B, 3, H, W)."""
        for narrow, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(narrow(x))
        return self.head(self.dropout(self.norm(x.mean((2, 3)))))
