"""Stochastic depth: residual branches that are left out of some images in training."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth, stochastic_depth

from odconv.models.convnext import ConvNeXt


def drop_paths(model: nn.Module, share: float) -> None:
    """Leave each residual branch of a network out of a share of the images while it trains; its keys stay.

    The share is the same in all blocks of a ResNet, and grows with the depth from 0 in a ConvNeXt. It is a ValueError
    if the network has no residual blocks that are known.
    """
    if isinstance(model, ConvNeXt):
        inner = [part for part in model.modules() if isinstance(part, StochasticDepth)]
        for number, part in enumerate(inner):
            part.p = share * number / (len(inner) - 1)
        return
    blocks: list[Any] = [part for part in model.modules() if isinstance(part, BasicBlock | Bottleneck)]
    if not blocks:
        raise ValueError(
            f"drop_path must be 0 for a {type(model).__name__}, which is no ResNet and no ConvNeXt, got {share}"
        )
    for block in blocks:
        last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
        last.register_forward_hook(partial(drop, share=share))


def drop(norm: nn.Module, _: Any, branch: Tensor, share: float) -> Tensor:
    """Return what the last norm of a branch gave, zero for a share of the images in training."""
    return stochastic_depth(branch, share, "row", norm.training)
