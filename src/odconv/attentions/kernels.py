"""The kernels that a layer convolves images with, all of its attentions taken together, and how alike its n are."""

from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from odconv.attentions.class_scatter import Scatter, scatter
from odconv.layers import Attentions
from odconv.ops.eager import mixed_kernels

NUMBERS = 1 << 22
"""Numbers of all images' kernels to compute at a time."""


@torch.no_grad()
def scatter_of_kernels(layer: Any, attentions: Attentions, labels: Tensor | None = None) -> Scatter:
    """Measure how much the kernel of a layer differs between images.

    This is what its attentions come to: shares of kernels that are alike change little, gates that cancel nothing.

    Args:
        layer: a dynamic convolution.
        attentions: what it made of B images.
        labels: their classes, (B), if these are known.

    Returns:
        The sums over all entries of the kernels.
    """
    if layer.transposed:  # whose weight has the channels first
        attentions = attentions._replace(channel=attentions.filter, filter=attentions.channel)
    weight, images = layer.weight.float().cpu(), max(len(a) for a in attentions if a is not None)
    per_filter = images * weight[0, 0].numel()
    block = max(1, NUMBERS // per_filter) if layer.groups == 1 else weight.shape[1]
    parts = []
    for start in range(0, weight.shape[1], block):
        filters = slice(start, start + block)
        gates = attentions if attentions.filter is None else attentions._replace(filter=attentions.filter[:, filters])
        parts.append(scatter(mixed_kernels(weight[:, filters], gates, layer.groups), labels))
    return reduce(add, parts)


def kernel_similarity(kernels: Tensor) -> Tensor:
    """Cosines (n, n) of the angles between kernels (n, ...): 1 for equal, 0 for unrelated, -1 for opposite ones."""
    directions = F.normalize(kernels.detach().float().flatten(1).cpu())
    return directions @ directions.T
