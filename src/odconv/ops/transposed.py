"""The transposed operator: its contract, its definition, and its fast backends.

In shapes: B batch, n kernels, O filters, C channels, g groups, k taps of a kernel.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from odconv.ops import traced
from odconv.ops.contract import (
    Attentions,
    Geometry,
    Placement,
    check_shapes,
    per_axis,
)
from odconv.ops.dynamic_conv import add_bias, compute_dtype, mixed_bias
from odconv.ops.eager import mix, over_map
from odconv.ops.policy import choose_transposed, is_differentiated, loses_gradients
from odconv.ops.reference import TRANSPOSED, by_sample


def dynamic_conv_transpose(
    x: Tensor,
    weight: Tensor,
    *,
    kernel: Tensor | None = None,
    spatial: Tensor | None = None,
    channel: Tensor | None = None,
    filter: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Transposed convolution of each sample with its own mixture of n kernels, in 1, 2 or 3 dimensions.

    ``y[b] = filter[b] * conv_transpose(channel[b] * x[b], sum_i kernel[b, i] * (spatial[b] * weight[i])) + bias``:
    what :func:`dynamic_conv` is to ``F.conv2d``, this is to ``F.conv_transpose2d``.

    Args:
        x: input, (B, C, L), (B, C, H, W) or (B, C, D, H, W); B may be 0.
        weight: the n kernels, (n, C, O/groups, *kernel_size).
        kernel: share of each kernel, (B, n); may be None only for n = 1.
        spatial: weight of each tap, (B, *kernel_size).
        channel: weight of each input channel, (B, C).
        filter: weight of each output filter, (B, O).
        bias: (O), added after `filter`, or (n, O), mixed by `kernel` and then added.
        stride: distance between the places where the kernel is laid down, an int or one an axis.
        padding: what is cut off on both sides of the output, an int or one an axis.
        output_padding: what is added at the end of the output, below stride or dilation, an int or one an axis.
        dilation: distance between taps, an int or one an axis.
        groups: blocks of channels and filters that are convolved apart; divides C and O.
        backend: "auto" takes "grouped", and "dense" for an export or an empty batch. A named one is strict:
            "reference" (the definition, a loop), "grouped" (B > 0), "dense", or "traced" (for torch.jit.trace).

    Returns:
        (B, O, *map), in x's dtype, or in the autocast dtype under autocast.

    Raises:
        ValueError: an argument's shape or value does not fit; the message names it and what is expected.
        TypeError: x and weight differ in dtype outside autocast.
    """
    attentions = Attentions(kernel, spatial, channel, filter)
    check_shapes(x, weight, attentions, bias, groups, transposed=True)
    dims = weight.dim() - 3
    steps = per_axis("stride", stride, dims, least=1)
    cut = per_axis("padding", padding, dims, least=0)
    spread = per_axis("dilation", dilation, dims, least=1)
    extra = per_axis("output_padding", output_padding, dims, least=0)
    placed = Geometry(steps, cut, spread, groups)
    map_size = output_size(x, tuple(weight.shape[3:]), placed, extra)
    geometry = (steps, cut, extra, groups, spread)  # in F.conv_transpose2d's order

    dtype = compute_dtype(x, weight)
    differentiated = x.device.type == "cpu" and is_differentiated(x, weight)
    if differentiated and loses_gradients(map_size, weight.shape[3:], placed, dtype):  # as a convolution of y does
        with torch.autocast("cpu", enabled=False):
            return dynamic_conv_transpose(
                x.float(), weight.float(), **attentions._asdict(), bias=bias, stride=stride, padding=padding,
                output_padding=output_padding, dilation=dilation, groups=groups, backend=backend,
            ).to(dtype)  # fmt: skip
    x, weight = x.to(dtype), weight.to(dtype)
    attentions = Attentions(*(None if a is None else a.to(dtype) for a in attentions))

    if backend == "auto":
        backend = choose_transposed(x).backend
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    elif backend == "grouped" and x.shape[0] == 0:
        raise ValueError(f"backend 'grouped' needs at least one sample, got x of shape {tuple(x.shape)}")
    y = BACKENDS[backend](x, weight, attentions, geometry)
    return add_bias(y, mixed_bias(bias, attentions.kernel))


def output_size(x: Tensor, taps: tuple[int, ...], geometry: Geometry, extra: tuple[int, ...]) -> tuple[int, ...]:
    """Return the map of the output, one number an axis each.

    Raises:
        ValueError: it is empty, or its padding is none that the geometry allows.
    """
    sizes = []
    for extent, k, s, p, d, e in zip(x.shape[2:], taps, *geometry[:3], extra, strict=True):
        if e >= max(s, d):
            raise ValueError(
                f"output_padding must be below stride {geometry.stride} or dilation {geometry.dilation}, got {extra}"
            )
        sizes.append((extent - 1) * s - 2 * p + d * (k - 1) + e + 1)
        if sizes[-1] < 1:
            raise ValueError(f"padding must leave some of the output, got {geometry.padding} for x of {tuple(x.shape)}")
    return tuple(sizes)


def reference(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Placement) -> Tensor:
    """Compute the formula, sample by sample: the definition that the other backends are held against."""
    conv = TRANSPOSED[weight.dim() - 3]
    return by_sample(lambda sample, mixed: conv(sample, mixed, None, *geometry), x, weight, attentions)


def grouped(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Placement) -> Tensor:
    """Mix a kernel for each sample, then one transposed convolution in which every sample is a group (or `groups`)."""
    kernel, spatial, channel, filter = attentions
    batch, groups = x.shape[0], geometry[3]
    mixed = mix(weight, kernel)
    if spatial is not None:
        mixed = mixed * spatial[:, None, None]
    x = x if channel is None else x * over_map(channel, x)
    mixed = mixed.expand(batch, *mixed.shape[1:]).flatten(0, 1)  # (B * C, O/g, *k)
    one_sample = x.reshape(1, -1, *x.shape[2:])
    stride, padding, extra, _, dilation = geometry
    y = TRANSPOSED[weight.dim() - 3](one_sample, mixed, None, stride, padding, extra, batch * groups, dilation)
    y = y.view(batch, -1, *y.shape[2:])
    return y if filter is None else y * over_map(filter, y)


def dense(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Placement) -> Tensor:
    """Return a matrix product for all taps, then lay them down; the batch is never a number of groups."""
    kernel, spatial, channel, filter = attentions
    taps, groups = tuple(weight.shape[3:]), geometry[3]
    x = x if channel is None else x * over_map(channel, x)
    mixed = mix(weight, kernel).unflatten(1, (groups, -1)).flatten(3)  # (B or 1, g, C/g, O/g * k)
    columns = mixed.transpose(2, 3) @ x.flatten(2).unflatten(1, (groups, -1))  # (B, g, O/g * k, positions)
    columns = columns.flatten(1, 2).unflatten(1, (-1, math.prod(taps)))  # (B, O, k, positions)
    if spatial is not None:
        columns = columns * spatial.flatten(1)[:, None, :, None]
    filters = columns.shape[1]
    columns = columns.flatten(1, 2).unflatten(2, x.shape[2:])
    # a kernel with a single one lays each tap down in its place: a sum of columns in any number of dimensions
    ones = torch.eye(math.prod(taps), dtype=x.dtype, device=x.device).reshape(-1, 1, *taps)
    stride, padding, extra, _, dilation = geometry
    ones = ones.repeat(filters, 1, *(1,) * len(taps))
    y = TRANSPOSED[len(taps)](columns, ones, None, stride, padding, extra, filters, dilation)
    return y if filter is None else y * over_map(filter, y)


BACKENDS = {"reference": reference, "grouped": grouped, "dense": dense, "traced": traced.convolve_transposed}
