"""What PyTorch's FlopCounterMode, and Lightning's summary with it, count for the operators that are compiled here."""

import math
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from odconv.ops.contract import Geometry
from odconv.ops.reach import count_pairs

Shape = Sequence[int]


def watch() -> None:
    """Register the formulas if there may be a counter: what calls the operators calls this before."""
    if not torch.compiler.is_compiling() and "torch.utils.flop_counter" in sys.modules:
        register()


@cache
def register() -> None:
    """Register the formulas, once, and with the counters that are counting.

    PyTorch's counter imports Triton where that is installed, which is why ``import odconv`` does not do this.
    """
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ops = torch.ops.odconv
    register_flop_formula([ops.conv, ops.triton_conv])(forward)
    register_flop_formula(ops.conv_fused)(fused)
    register_flop_formula([ops.conv_backward, ops.triton_conv_backward])(backward)
    register_flop_formula(ops.conv_cells)(cells)
    register_flop_formula(ops.conv_cells_backward)(cells_backward)
    register_flop_formula(ops.conv_samples)(samples)
    register_flop_formula(ops.conv_samples_backward)(samples_backward)
    register_flop_formula(ops.attend)(attend)
    for mode in _get_current_dispatch_mode_stack():  # each has the formulas that were there when it was made
        counter: Any = getattr(mode, "counter", None)
        if hasattr(counter, "flop_registry"):
            counter.flop_registry |= flop_registry


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


def fused(*arguments: Any, out_shape: Sequence[Shape], **_: Any) -> int:
    """Count as :func:`forward`; there is an output besides."""
    return forward(*arguments, out_shape=out_shape[0])


def cells(x: Shape, cells: Shape, shares: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """Count putting kernels together of cells, and the convolution with them."""
    return 2 * (
        out_shape[0] * math.prod(out_shape[2:]) * kernel_of(cells, shares) + x[0] * cells[0] * kernel_of(cells, shares)
    )


def cells_backward(grad: Shape, x: Shape, cells: Shape, shares: Shape, *rest: Any, **_: Any) -> int:
    """Count the gradient of x, for which kernels are put together again, and those of cells and shares."""
    to_x, to_kernels = rest[4:]
    # over all numbers of each sample's kernel
    passes = (to_x + to_kernels) * math.prod(grad[2:]) + (to_x + 2 * to_kernels) * cells[0]
    return 2 * grad[0] * passes * kernel_of(cells, shares)


def kernel_of(cells: Shape, shares: Shape) -> int:
    """Return the numbers of a kernel, which has as many pieces as there are rows of shares."""
    return shares[1] * math.prod(cells[1:])


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


def samples(x: Shape, weight: Shape, shares: Shape, *geometry: Shape, out_shape: Shape, **_: Any) -> int:
    """Count the products with n kernels at the taps that meet the map, and scaling the map for each."""
    pairs = count_pairs(x[2:], weight[3:], geometry_of(geometry))
    return 2 * x[0] * pairs * weight[0] * weight[2] * (weight[1] + 1)


def samples_backward(grad: Shape, x: Shape, weight: Shape, shares: Shape, *rest: Any, **_: Any) -> int:
    """Count the gradient of x, to which and to the shares' the products are added, and that of the kernels."""
    *geometry, to_samples, to_kernels = rest
    pairs = count_pairs(x[2:], weight[3:], geometry_of(geometry))
    filters, channels = weight[1], weight[2]
    each = to_samples * channels * (filters + 2) + to_kernels * filters * (channels + 1)
    return 2 * x[0] * pairs * weight[0] * each


def geometry_of(numbers: Sequence[Sequence[int]]) -> Geometry:
    """Return stride, padding and dilation, as an operator gets them, as a geometry without groups."""
    stride, padding, dilation = map(tuple, numbers)
    return Geometry(stride, padding, dilation, 1)


def attend(
    pooled: Shape, fc: Shape | None, norm: Any, groups: int, eps: float, weights: Sequence[Shape], *_: Any, **__: Any
) -> int:
    """Count the hidden layer and the heads."""
    layers = [*weights, *([] if fc is None else [fc])]
    return 2 * pooled[0] * sum(math.prod(layer) for layer in layers)


def convolution(weight: Shape, y: Shape) -> int:
    """Return the multiply-adds of a convolution, weight (n, O, C/groups, *kernel_size), to a map y."""
    return math.prod(y) * math.prod(weight[2:])
