"""Backends for torch.jit.trace and the ONNX exporter that is built on it.

These keep a size as it was traced wherever they cannot follow how it came about. So every size is a constant here, but
for those of the batch and the map, which pass through operations that exporters follow.
"""

import math
import warnings

import torch
from torch import Tensor

from odconv.ops.contract import Attentions, Geometry, Placement
from odconv.ops.reference import CONVOLUTIONS, TRANSPOSED


def convolve(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Take the patches of x by a convolution with ones, scale them, and multiply them with the mixed kernels."""
    kernel, spatial, channel, filter = attentions
    n, filters, per_group, *taps = constant_shape(weight)
    groups, axes = geometry.groups, (1,) * len(taps)
    if channel is not None:
        x = x * channel.reshape(-1, groups * per_group, *axes)
    if n == 1 and spatial is None:
        y = CONVOLUTIONS[len(taps)](x, weight.reshape(filters, per_group, *taps), None, *geometry)
    elif n == 1:
        columns = scaled_columns(x, taps, groups * per_group, spatial, geometry)
        rows = weight.reshape(filters, per_group * math.prod(taps), *axes)
        y = CONVOLUTIONS[len(taps)](columns, rows, None, groups=groups)
    else:
        columns = scaled_columns(x, taps, groups * per_group, spatial, geometry)
        mixed = mix(weight, kernel, (groups, filters // groups, per_group * math.prod(taps)))
        y = multiplied(mixed, columns, (groups, filters, per_group * math.prod(taps)))
    return scaled_output(y, n, kernel, filter, filters)


def convolve_per_sample(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Multiply the scaled patches of x with a kernel for each sample, as :func:`convolve` does with mixed ones."""
    _, spatial, channel, filter = attentions
    _, filters, per_group, *taps = constant_shape(weight)
    groups = geometry.groups
    if channel is not None:
        x = x * channel.reshape(-1, groups * per_group, *(1,) * len(taps))
    columns = scaled_columns(x, taps, groups * per_group, spatial, geometry)
    depth = per_group * math.prod(taps)
    y = multiplied(weight.reshape(-1, groups, filters // groups, depth), columns, (groups, filters, depth))
    return scaled_output(y, 0, None, filter, filters)


def scaled_columns(x: Tensor, taps: list[int], channels: int, spatial: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the patches of x times the spatial attention, (B, C * k, *map)."""
    k, axes = math.prod(taps), (1,) * len(taps)
    each = x.reshape(-1, 1, *x.shape[2:])
    patches = CONVOLUTIONS[len(taps)](each, one_tap_each(taps, x), None, *geometry._replace(groups=1))
    if spatial is not None:  # patches are (B * C, k, *map)
        patches = patches.reshape(-1, channels, k, *patches.shape[2:]) * spatial.reshape(-1, 1, k, *axes)
    return patches.reshape(-1, channels * k, *patches.shape[-len(taps) :])


def multiplied(mixed: Tensor, columns: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Return the products of kernels, (B, g, O/g, depth), and columns, as maps, (B, O, *map); sizes are g, O, depth."""
    groups, filters, depth = sizes
    y = mixed @ columns.reshape(-1, groups, depth, math.prod(columns.shape[2:]))
    return y.reshape(-1, filters, *columns.shape[2:])


def convolve_transposed(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Placement) -> Tensor:
    """Multiply x with the mixed kernels, scale what each tap gives, and lay the taps down by ones."""
    kernel, spatial, channel, filter = attentions
    n, channels, per_group, *taps = constant_shape(weight)
    stride, padding, extra, groups, dilation = geometry
    k, axes = math.prod(taps), (1,) * len(taps)
    filters = per_group * groups
    if channel is not None:
        x = x * channel.reshape(-1, channels, *axes)
    if n == 1:
        rows = weight.reshape(groups, channels // groups, per_group * k).transpose(1, 2)
        columns = CONVOLUTIONS[len(taps)](x, rows.reshape(filters * k, -1, *axes), None, groups=groups)
    else:
        mixed = mix(weight, kernel, (groups, channels // groups, per_group * k)).transpose(2, 3)
        columns = mixed @ x.reshape(-1, groups, channels // groups, math.prod(x.shape[2:]))
    columns = columns.reshape(-1, filters, k, *x.shape[2:])
    if spatial is not None:
        columns = columns * spatial.reshape(-1, 1, k, *axes)
    each = columns.reshape(-1, k, *x.shape[2:])
    y = TRANSPOSED[len(taps)](each, one_tap_each(taps, x), None, stride, padding, extra, 1, dilation)
    return scaled_output(y.reshape(-1, filters, *y.shape[2:]), n, kernel, filter, filters)


def mix(weight: Tensor, kernel: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return the mixed kernels, each of them in `shape`."""
    assert kernel is not None
    return (kernel @ weight.reshape(-1, math.prod(shape))).reshape(-1, *shape)


def scaled_output(y: Tensor, n: int, kernel: Tensor | None, filter: Tensor | None, filters: int) -> Tensor:
    """Return y times the filter attention, and times the share of a lone kernel."""
    axes = (1,) * (y.dim() - 2)
    if n == 1 and kernel is not None:
        y = y * kernel.reshape(-1, 1, *axes)
    return y if filter is None else y * filter.reshape(-1, filters, *axes)


def one_tap_each(taps: list[int], like: Tensor) -> Tensor:
    """Return k kernels, (k, 1, *taps), each with a single one, at its own tap."""
    k = math.prod(taps)
    rows = [[float(i == j) for j in range(k)] for i in range(k)]
    return torch.tensor(rows, dtype=like.dtype, device=like.device).reshape(k, 1, *taps)


def constant_shape(parameter: Tensor) -> list[int]:
    """Return the shape of a parameter as numbers that a tracer does not follow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return [int(size) for size in parameter.shape]
