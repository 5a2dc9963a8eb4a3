"""The definition of the operator, as plain as its formula: the form that every other form is held against."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from odconv.ops.contract import Attentions, Geometry

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def reference(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Compute filter[b] * conv(channel[b] * x[b], sum_i kernel[b, i] * spatial[b] * weight[i]), b by b."""
    conv = CONVOLUTIONS[weight.dim() - 3]
    return by_sample(lambda sample, mixed: conv(sample, mixed, None, *geometry), x, weight, attentions)


def by_sample(conv: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, attentions: Attentions) -> Tensor:
    """Compute the operator's formula around a convolution of a batch with one kernel, transposed or not.

    Without a kernel attention, weight has one kernel for all samples, or one for each.
    """
    kernel, spatial, channel, filter = attentions
    per_map = (-1, *(1,) * (weight.dim() - 3))
    if x.shape[0] == 0:  # nothing to stack; the map of an empty batch does not depend on the attentions
        return conv(x, weight[:1].sum(0))
    outputs = []
    for b, sample in enumerate(x):
        mixed = torch.zeros_like(weight[0])
        for i, one_kernel in enumerate(weight if kernel is not None or len(weight) == 1 else weight[b : b + 1]):
            term = one_kernel if spatial is None else spatial[b] * one_kernel
            mixed = mixed + (term if kernel is None else kernel[b, i] * term)
        scaled = sample if channel is None else channel[b].view(per_map) * sample
        y = conv(scaled[None], mixed)[0]
        outputs.append(y if filter is None else filter[b].view(per_map) * y)
    return torch.stack(outputs)
