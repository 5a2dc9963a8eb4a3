"""Kernels that are mixed in some way of one's own, once in the forward pass and again in the backward pass."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from odconv.ops import cpu, eager
from odconv.ops.contract import Attentions, Geometry, check_shapes, is_exporting, is_traced
from odconv.ops.dynamic_conv import add_bias, checked_geometry, compute, compute_dtype
from odconv.ops.policy import choose_plain, is_differentiated
from odconv.ops.recompute import Backend, Step, apply, grouped_backward, pointwise_backward

PART = 24 * 2**20
"""Bytes of kernels that are mixed at a time on the CPU without gradients: the C library gets blocks of 32 MiB and more
from the system anew each time, page by page, which takes longer than mixing."""


def mixed_conv(
    x: Tensor,
    mix: eager.Mix,
    parts: Tensor,
    shares: Tensor,
    kernel_shape: Sequence[int],
    *,
    channel: Tensor | None = None,
    filter: Tensor | None = None,
    spatial: Tensor | None = None,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve each sample with the kernel that `mix` makes for it, and keep no kernel for the backward pass.

    The result is that of ``per_sample_conv(x, mix(parts, shares), ...)``. With gradients it works through the batch a
    few samples at a time, and saves x, the parts, the shares and the attentions; the backward pass mixes again.

    Args:
        x: input, (B, C, L), (B, C, H, W) or (B, C, D, H, W).
        mix: makes kernels, (B', O, C/groups, *kernel_size), of parts and the shares of B' samples, whatever B' is, with
            differentiable operations and without randomness.
        parts: what kernels are made of, the same for all samples, any shape.
        shares: what each sample takes of it, (B, ...).
        kernel_shape: (O, C/groups, *kernel_size).
        channel, filter, spatial, bias, stride, padding, dilation, groups: as in :func:`per_sample_conv`.

    Returns:
        (B, O, *map), in x's dtype, or in the autocast dtype under autocast.

    Raises:
        ValueError: an argument's shape or value does not fit; the message names it and what is expected.
        TypeError: x and parts differ in dtype outside autocast.
    """
    attentions = Attentions(shares, spatial, channel, filter)
    x, parts, attentions, geometry = checked(
        x, parts, attentions, kernel_shape, bias, stride, padding, dilation, groups
    )

    def run(x: Tensor, parts: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
        weight = mix(parts, attentions.kernel)
        if tuple(weight.shape[1:]) != tuple(kernel_shape):
            raise ValueError(f"mix must make kernels of {('B', *kernel_shape)}, got {tuple(weight.shape)}")
        return compute(x, weight, attentions._replace(kernel=None), None, geometry, per_sample=True)

    if x.shape[0] > 0 and is_differentiated(x, parts, *attentions):
        y = apply(Step(run, geometry, math.prod(kernel_shape), False, mix, backward), x, parts, attentions)
    else:
        y = in_parts(run, x, parts, attentions, geometry, math.prod(kernel_shape))
    return add_bias(y, bias)


def checked(
    x: Tensor,
    parts: Tensor,
    attentions: Attentions,
    kernel_shape: Sequence[int],
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Attentions, Geometry]:
    """Return the arguments of :func:`mixed_conv` in the dtype that is computed in, once they are checked."""
    shares, *others = attentions
    if shares is None or shares.dim() == 0 or shares.shape[0] != x.shape[0]:
        shape = None if shares is None else tuple(shares.shape)
        raise ValueError(f"shares must have shape (B, ...) with B = {x.shape[0]}, got {shape}")
    kernels = parts.new_empty(()).expand(x.shape[0], *kernel_shape)
    check_shapes(x, kernels, Attentions(None, *others), bias, groups, per_sample=True)
    x, geometry = checked_geometry(x, tuple(kernel_shape[2:]), stride, padding, dilation, groups)
    dtype = compute_dtype(x, parts)
    attentions = Attentions(*(None if a is None else a.to(dtype) for a in attentions))
    return x.to(dtype), parts.to(dtype), attentions, geometry


def in_parts(run: Backend, x: Tensor, parts: Tensor, attentions: Attentions, geometry: Geometry, kernel: int) -> Tensor:
    """Compute a batch, on the CPU a few samples at a time; `kernel` counts the numbers of one sample's kernel."""
    count = part_of_batch(x, kernel)
    if x.shape[0] <= count:
        return run(x, parts, attentions, geometry)
    of_each = [[None] * -(-x.shape[0] // count) if a is None else a.split(count) for a in attentions]
    samples = zip(x.split(count), *of_each, strict=True)
    return torch.cat([run(own, parts, Attentions(*given), geometry) for own, *given in samples])


def part_of_batch(x: Tensor, kernel: int) -> int:
    """Return how many samples are computed at a time without gradients."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_exporting() or is_traced():
        return x.shape[0]
    return max(1, PART // (kernel * x.element_size()))


def backward(
    grad: Tensor, x: Tensor, mixed: Tensor, geometry: Geometry, to_x: bool, to_mixed: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of a kernel for each sample."""
    if cpu.is_depthwise(mixed, geometry.groups):
        differentiate = cpu.depthwise_backward(x, geometry.groups)
    elif x.dtype not in cpu.HALF and cpu.fits(x, mixed, geometry):
        differentiate = cpu.backward_per_sample
    elif choose_plain(x, mixed, geometry, None).backend == "pointwise":
        differentiate = pointwise_backward
    else:
        differentiate = grouped_backward
    return differentiate(grad, x, mixed, geometry, to_x, to_mixed)
