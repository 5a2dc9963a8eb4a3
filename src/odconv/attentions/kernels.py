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


def usage(shares: Tensor) -> Tensor:
    """Return how much of each of n kernels or cells an image's kernel takes, (B, n).

    Args:
        shares: of kernels, (B, n), or of cells in each of m pieces, (B, m, n), whose sizes count.
    """
    return shares if shares.dim() == 2 else shares.abs().mean(1)


def kernel_similarity(kernels: Tensor) -> Tensor:
    """Cosines (n, n) of the angles between kernels or cells, (n, ...): 1 equal, 0 unrelated, -1 opposite."""
    directions = F.normalize(kernels.detach().float().flatten(1).cpu())
    return directions @ directions.T
