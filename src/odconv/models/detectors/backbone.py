"""A network of the zoo as the backbone of a detector: four stages, a feature pyramid, what is frozen."""

from collections import OrderedDict
from collections.abc import Iterable
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from odconv.layers.warehouse import Warehouse
from odconv.models.convnext import EPSILON, ChannelNorm, ConvNeXt

CHANNELS = 256
"""Channels of every level of the pyramid."""


class Pyramid(BackboneWithFPN):
    """The feature pyramid on a backbone, five levels of 256 channels.

    Args:
        network: a ResNet or MobileNetV2 of torchvision or our ConvNeXt, with whatever convolutions; its classifier is
            left out. What the pyramid takes of a ConvNeXt, whose stages end without a norm, is normalised first.
        single_stage: False for levels 2 to 5 from the four stages and 6 by max-pooling, as R-CNNs have; True for
            levels 3 to 5 from the last three and 6 and 7 by convolutions, as RetinaNet has.
        frozen_stages: how many of the four stages, the stem with the first, are not trained.
        norm_eval: True to keep all batch norm of the backbone in evaluation mode; that of frozen stages is in any case.

    The parameters have the names that torchvision's own detectors give them.
    """

    def __init__(self, network: nn.Module, single_stage: bool, frozen_stages: int, norm_eval: bool) -> None:
        body, stages, channels = split(network)
        first = int(single_stage)
        levels = {stage[-1]: str(level) for level, stage in enumerate(stages[first:])}
        extra: ExtraFPNBlock = LastLevelP6P7(CHANNELS, CHANNELS) if single_stage else LastLevelMaxPool()
        super().__init__(body, levels, channels[first:], CHANNELS, extra_blocks=extra)
        if isinstance(network, ConvNeXt):
            for block, width in zip(self.fpn.inner_blocks, channels[first:], strict=True):
                block.insert(0, ChannelNorm(width, eps=EPSILON))
        frozen = [child for stage in stages[:frozen_stages] for child in stage]
        for child in frozen:
            self.body[child].requires_grad_(False)
        self.evaluating = (
            list(self.body) if norm_eval else frozen
        )  # names, for SyncBatchNorm takes the place of modules
        self.train(self.training)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels of the pyramid, finest first, by torchvision's names; under autocast in float32.

        Anchors and boxes take their dtype from the levels, and half precision is too coarse for pixels.
        """
        levels: dict[str, Tensor] = super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            return {name: level.float() for name, level in levels.items()}
        return levels

    def train(self, mode: bool = True) -> "Pyramid":
        """Set the mode of all but the batch norm that stays in evaluation mode, the attentions' included."""
        super().train(mode)
        for child in self.evaluating:
            for module in self.body[child].modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def split(network: nn.Module) -> tuple[Any, list[list[str]], list[int]]:
    """Return the part of a network that computes maps, its children's names by stage, and the stages' channels."""
    if isinstance(network, ResNet):
        stages = [["conv1", "bn1", "layer1"], ["layer2"], ["layer3"], ["layer4"]]
        return network, stages, [network.inplanes // share for share in (8, 4, 2, 1)]
    if isinstance(network, MobileNetV2):
        features: Any = network.features
        halving = [block for block, module in enumerate(features) if getattr(module, "stride", 1) == 2]
        ends = [0, *halving[1:], len(features)]  # the first stage has the stem's stride and another one
        stages = [[str(block) for block in range(*pair)] for pair in pairwise(ends)]
        return body_of(network, stages, features), stages, [features[int(stage[-1])].out_channels for stage in stages]
    if isinstance(network, ConvNeXt):
        stages = [[f"narrow{level}", f"stage{level}"] for level in range(len(network.stages))]
        parts = [part for pair in zip(network.downsample_layers, network.stages, strict=True) for part in pair]
        blocks: Any = network.stages
        return body_of(network, stages, parts), stages, [stage[0].gamma.shape[1] for stage in blocks]
    raise ValueError(
        f"backbone must be a ResNet or a MobileNetV2 of torchvision or a ConvNeXt, got a {type(network).__name__}"
    )


def body_of(network: nn.Module, stages: list[list[str]], parts: Iterable[nn.Module]) -> nn.Sequential:
    """Return the parts of the stages by name, behind the warehouse whose cells they share, if there is one."""
    shared = {name: part for name, part in network.named_children() if isinstance(part, Warehouse)}
    return nn.Sequential(OrderedDict(shared | dict(zip(chain.from_iterable(stages), parts, strict=True))))
