"""Fast backends in plain PyTorch; :func:`~odconv.ops.reference.reference` is their definition.

Every one takes the reference's arguments, checked already, and returns the same up to rounding. Weight has n kernels,
which :func:`mix` makes one for each sample of; or, without a kernel attention, one for all samples or one for each.
Each backend rests on one identity: a batch of one needs one ordinary convolution (`single`), one kernel needs no mixing
(`shared`), a small map makes a batched matrix product (`product`), as a kernel of one tap does without columns
(`pointwise`), and a large map a convolution whose groups are the samples (`grouped`, which is also the depth-wise one).
:func:`~odconv.ops.policy.choose` picks one by shape.

In shapes: B batch, n kernels, O filters, C channels, g groups, k taps of a kernel, L output positions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from odconv.ops.contract import Attentions, Geometry, is_channels_last, is_exporting, output_size, surely
from odconv.ops.reference import CONVOLUTIONS

Mix = Callable[[Tensor, Tensor | None], Tensor]  # of weight and the kernel attention, (B or 1, O, C/g, *k)
MIXED_BLOCK = 128 * 1024  # numbers a sample; larger blocks leave the cache


def single(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Mix once for B = 1, then convolve once; `channel` and `filter` scale the kernel where it is the smaller.

    The gates of the kernel are as long as its rows, since onnxruntime is slow to multiply by a few taps at a time.
    """
    kernel, spatial, channel, filter = attentions
    groups, (filters, per_group, *taps) = geometry.groups, weight.shape[1:]
    mixed = mix(weight, kernel).reshape(groups, -1, per_group * math.prod(taps))
    gate = None if spatial is None else spatial.reshape(1, 1, 1, -1)
    if channel is not None and surely(math.prod(x.shape[1:]) > mixed.numel()):
        rows = channel.reshape(groups, 1, per_group, 1)
        gate = rows if gate is None else rows * gate
    elif channel is not None:
        x = x * over_map(channel, x)
    if gate is not None:
        mixed = mixed * gate.expand(-1, -1, per_group, math.prod(taps)).flatten(2)
    size = output_size(x.shape[2:], taps, *geometry[:3])
    if filter is not None and surely(math.prod(size) > mixed.shape[2]):
        mixed, filter = mixed * filter.reshape(groups, -1, 1), None
    y = CONVOLUTIONS[weight.dim() - 3](x, mixed.reshape(filters, per_group, *taps), None, *geometry)
    return y if filter is None else y * over_map(filter, y)


def shared(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Convolve the whole batch with all n kernels in one dense convolution, and mix their n outputs.

    For n = 1 there is nothing to mix and nothing is lost; for n > 1 it is n times the arithmetic, but at full speed and
    without a kernel per sample.
    """
    kernel, spatial, channel, filter = attentions
    conv, n = CONVOLUTIONS[weight.dim() - 3], weight.shape[0]
    by_group = weight.unflatten(1, (geometry.groups, -1)).transpose(0, 1)  # (g, n, O/g, C/g, *k)
    if spatial is None:
        x = x if channel is None else x * over_map(channel, x)
        y = conv(x, by_group.flatten(0, 2), None, *geometry)
    else:
        cols, size = scaled_columns(x, weight, attentions, geometry)
        rows = by_group.flatten(0, 2).flatten(1)  # (g * n * O/g, C/g * k)
        if geometry.groups == 1 and not is_exporting() and math.prod(size) == 1:
            y = F.linear(cols.flatten(1), rows)[..., None]
        else:  # as a 1x1 convolution: oneDNN is twice as fast as MKL's matrix product on AMD, but not for one position
            y = F.conv1d(cols.flatten(1, 2), rows[..., None], groups=geometry.groups)
        y = y.unflatten(2, size)
    if n > 1 and kernel is not None:
        y = y.unflatten(1, (geometry.groups, n, -1))
        y = (y * over_map(kernel[:, None, :, None], y)).sum(2).flatten(1, 2)
    elif kernel is not None:
        filter = kernel if filter is None else filter * kernel
    return y if filter is None else y * over_map(filter, y)


def product(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Multiply columns with the mixed kernels, one matrix product a sample and group, mixed a few filters at a time."""
    cols, size = scaled_columns(x, weight, attentions, geometry)
    blocks = weight.unflatten(1, (geometry.groups, -1)).split(filters_per_block(weight, geometry.groups), dim=2)
    outputs = []
    for block in blocks:
        mixed = mix(block, attentions.kernel).flatten(3)  # (B, g, block, C/g * k)
        outputs.append(mixed @ cols)
    y = torch.cat(outputs, dim=2).flatten(1, 2).unflatten(2, size)
    return y if attentions.filter is None else y * over_map(attentions.filter, y)


def filters_per_block(weight: Tensor, groups: int) -> int:
    """Return how many filters to mix at a time so that a sample's block of kernels holds about MIXED_BLOCK numbers."""
    filters = weight.shape[1] // groups
    if torch.compiler.is_compiling():  # the compiler plans its own memory, and an unrolled loop costs it time
        return filters
    return max(1, min(filters, MIXED_BLOCK * filters // math.prod(weight.shape[1:])))


def grouped(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Convolve once with every sample as a group (or `groups` of them): for large maps and depth-wise kernels."""
    batch = x.shape[0]
    mixed = mixed_kernels(weight, attentions, geometry.groups)
    mixed = mixed.expand(batch, *mixed.shape[1:]).flatten(0, 1)  # (B * O, C/g, *k)
    one_sample = x.reshape(1, -1, *x.shape[2:])
    geometry = geometry._replace(groups=batch * geometry.groups)
    y = CONVOLUTIONS[weight.dim() - 3](one_sample, mixed, None, *geometry)
    return y.view(batch, -1, *y.shape[2:])


def pointwise(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
    """Multiply the map of each sample with its mixed kernel of one tap, without groups and padding, in x's layout."""
    x = x[every(geometry.stride)]
    mixed = mixed_kernels(weight, attentions, 1).flatten(2).expand(x.shape[0], -1, -1)  # (B, O, C)
    if has_channels_last(x):
        return (rows_of(x) @ mixed.mT).unflatten(1, x.shape[2:]).movedim(-1, 1)
    return (mixed @ x.flatten(2)).unflatten(2, x.shape[2:])


def every(stride: Sequence[int]) -> Any:
    """Return an index of the positions of a map that one tap meets."""
    return (..., *(slice(None, None, step) for step in stride))


def has_channels_last(x: Tensor) -> bool:
    """Return whether the channels of a map lie next to each other in memory, and it is not contiguous too."""
    return not x.is_contiguous() and is_channels_last(x)


def rows_of(x: Tensor) -> Tensor:
    """Return the positions of a map as rows of channels, (B, positions, C)."""
    return x.movedim(1, -1).reshape(x.shape[0], math.prod(x.shape[2:]), x.shape[1])


def mix(weight: Tensor, kernel: Tensor | None) -> Tensor:
    """Mix a kernel for each sample, (B, O, C/g, *k), as one matrix product; weight itself without shares."""
    return weight if kernel is None else (kernel @ weight.flatten(1)).unflatten(1, weight.shape[1:])


def mixed_kernels(weight: Tensor, attentions: Attentions, groups: int, mix: Mix = mix) -> Tensor:
    """Return kernels that hold all four attentions, (B, O, C/g, *k), so that the maps need no further pass."""
    kernel, spatial, channel, filter = attentions
    mixed = mix(weight, kernel)
    if spatial is not None or channel is not None:
        gate = row_gate(spatial, channel, groups, mixed)
        mixed = (mixed.unflatten(1, (groups, -1)) * gate).flatten(1, 2)
    if filter is not None:
        mixed = mixed * over_map(filter[..., None], mixed)
    return mixed


def row_gate(spatial: Tensor | None, channel: Tensor | None, groups: int, mixed: Tensor) -> Tensor:
    """Return what all filters of a group are multiplied by, (B, g or 1, 1, C/g or 1, *k or 1).

    It is as long as they are, since to multiply by a few taps at a time is slow.
    """
    dims = mixed.dim() - 3
    ones = (1,) * dims
    rows = None if channel is None else channel.reshape(channel.shape[0], groups, 1, mixed.shape[2], *ones)
    if spatial is None:
        assert rows is not None
        return rows
    taps = spatial[:, None, None, None]
    if rows is None:
        rows = taps.new_ones(1, 1, 1, mixed.shape[2], *ones)
    return rows * taps


def over_map(scale: Tensor, like: Tensor) -> Tensor:
    """Return `scale` with trailing axes of one, to be multiplied with `like`."""
    return scale.reshape(*scale.shape, *(1,) * (like.dim() - scale.dim()))


def scaled_columns(
    x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the columns of x times channel and spatial attention, (B, g, C/g * k, L), and the map that L forms."""
    cols, size = columns(x, tuple(weight.shape[3:]), geometry)
    scale = None if attentions.channel is None else attentions.channel[:, :, None]
    if attentions.spatial is not None:
        taps = attentions.spatial.flatten(1)[:, None]
        scale = taps if scale is None else scale * taps
    if scale is not None:
        cols = cols * scale[..., None]
    return cols.unflatten(1, (geometry.groups, weight.shape[2])).flatten(2, 3), size


def columns(x: Tensor, kernel_size: tuple[int, ...], geometry: Geometry) -> tuple[Tensor, tuple[int, ...]]:
    """Return the patches that a kernel sees, (B, C, k, L), and the map that the L positions form."""
    stride, padding, dilation, _ = geometry
    taps = math.prod(kernel_size)
    if len(kernel_size) == 2 and taps > 1:
        size = output_size(x.shape[2:], kernel_size, *geometry[:3])
        return F.unfold(x, kernel_size, dilation, padding, stride).unflatten(1, (-1, taps)), size
    if any(padding):
        x = F.pad(x, [p for axis in reversed(padding) for p in (axis, axis)])
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        if k == 1:  # a slice, for which ONNX need not know the map
            x = x[(slice(None),) * axis + (slice(None, None, s),)].unsqueeze(-1)
        else:
            x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]  # a view: the taps of this axis go last
    dims = len(kernel_size)
    size = tuple(x.shape[2 : 2 + dims])
    return x.flatten(2 + dims).movedim(2 + dims, 2).flatten(3), size
