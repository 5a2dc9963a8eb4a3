"""The kernels that a layer convolves images with, all of its attentions taken together, and how alike its n are."""

from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn import functional as F

from odconv.attentions.class_scatter import Scatter, scatter
from odconv.layers import Attentions, PerSampleConv

NUMBERS = 1 << 22
"""Numbers of all images' kernels to compute at a time."""


@torch.no_grad()
def scatter_of_kernels(layer: PerSampleConv, attentions: Attentions, labels: Tensor | None = None) -> Scatter:
    """Measure how much the kernel of a layer differs between images.

    This is what its attentions come to: shares of kernels that are alike change little, gates that cancel nothing.

    Args:
        layer: a dynamic convolution.
        attentions: what it made of B images.
        labels: their classes, (B), if these are known.

    Returns:
        The sums over all entries of the kernels.
    """
    return reduce(add, (scatter(block, labels) for block in layer.kernel_blocks(attentions, NUMBERS)))


def kernel_similarity(kernels: Tensor) -> Tensor:
    """Cosines (n, n) of the angles between kernels (n, ...): 1 for equal, 0 for unrelated, -1 for opposite ones."""
    directions = F.normalize(kernels.detach().float().flatten(1).cpu())
    return directions @ directions.T
