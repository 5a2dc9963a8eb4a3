"""What torchvision's detectors do with boxes, where it would depend on half precision or on the first batch."""

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

STRIDES = (4, 8, 16, 32)
"""Pixels of the image for one of each level of the pyramid that boxes are pooled from."""


class FineCoder(BoxCoder):
    """torchvision's coder, in the finer dtype of boxes and deltas instead of that of the deltas.

    Under autocast the deltas are in half precision, in which a box at pixel 1000 is rounded to half a pixel (float16)
    or to four (bfloat16).
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Return the boxes (B, 4 K) that the deltas `rel_codes` (B, 4 K) make of `boxes` (B, 4)."""
        return super().decode_single(rel_codes.to(torch.promote_types(rel_codes.dtype, boxes.dtype)), boxes)


def set_coder(detector: nn.Module, coder: type[BoxCoder]) -> None:
    """Let every part of a detector that decodes boxes do so by `coder`, with the weights it has."""
    for module in detector.modules():
        if isinstance(old := getattr(module, "box_coder", None), BoxCoder):
            module.box_coder = coder(old.weights)


def fix_strides(detector: nn.Module) -> None:
    """Let boxes be pooled by the strides of the pyramid.

    torchvision infers them from the maps of the first batch, and wrongly if these are a few pixels wide.
    """
    for module in detector.modules():
        if isinstance(module, MultiScaleRoIAlign):
            module.scales = [1 / stride for stride in STRIDES]
            module.map_levels = initLevelMapper(2, 5, module.canonical_scale, module.canonical_level)
