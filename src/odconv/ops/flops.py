"""What PyTorch's FlopCounterMode, and Lightning's summary with it, count for the operators that are compiled here."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

Shape = Sequence[int]


@cache
def register() -> None:
    """Register the formulas, once; a counter takes those that are there when it is made.

    PyTorch's counter imports Triton where that is installed, which is why ``import odconv`` does not do this.
    """
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.odconv
    register_flop_formula([ops.conv, ops.triton_conv])(forward)
    register_flop_formula([ops.conv_backward, ops.triton_conv_backward])(backward)
    register_flop_formula(ops.attend)(attend)


def forward(
    x: Shape,
    weight: Shape,
    kernel: Shape | None,
    spatial: Shape | None,
    channel: Shape | None,
    filter: Shape | None,
    *geometry: Any,
    out_shape: Shape,
    **_: Any,
) -> int:
    """Count mixing, the convolution and the other attentions, a multiply-add as two."""
    passes = (weight[0] > 1) + (spatial is not None)  # over all weights of each sample
    mixing = x[0] * passes * math.prod(weight)
    scaled = (channel is not None) * math.prod(x) + (filter is not None) * math.prod(out_shape)
    return 2 * (convolution(weight, out_shape) + mixing + scaled)


def backward(
    grad: Shape,
    x: Shape,
    weight: Shape,
    kernel: Shape | None,
    spatial: Shape | None,
    channel: Shape | None,
    filter: Shape | None,
    *rest: Any,
    **_: Any,
) -> int:
    """Count the gradients of x and of the kernels, which are mixed again, and whose gradient goes to both factors."""
    to_x, to_weights = rest[4:] if len(rest) == 6 else (rest[4][0], any(rest[4][1:]))
    mixing = x[0] * math.prod(weight) * (weight[0] > 1)
    return 2 * ((to_x + to_weights) * convolution(weight, grad) + (1 + 2 * to_weights) * mixing)


def attend(pooled: Shape, fc: Shape | None, norm: Any, eps: float, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """Count the hidden layer and the heads."""
    layers = [*weights, *([] if fc is None else [fc])]
    return 2 * pooled[0] * sum(math.prod(layer) for layer in layers)


def convolution(weight: Shape, y: Shape) -> int:
    """Return the multiply-adds of a convolution, weight (n, O, C/groups, *kernel_size), to a map y."""
    return math.prod(y) * math.prod(weight[2:])
