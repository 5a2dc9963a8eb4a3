"""Launches the kernels: how each problem is cut into blocks, by its shape alone."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from odconv.ops.contract import Attentions, Geometry
from odconv.ops.triton import kernels

PROGRAMS = 1024  # where blocks of W alone are fewer, mixing splits the batch too; enough to fill any GPU
HELD = 4096  # numbers of W, over its n kernels, that one program of mixing holds in registers; half for n = 1


def forward(x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry, y: Tensor, workspace: int) -> None:
    """Convolve into y, with at most `workspace` bytes of mixed kernels, or one sample's."""
    x, (laid, groups) = x.contiguous(memory_format=torch.channels_last), lay(weight, geometry.groups)
    size = samples_at_once(len(x), weight, workspace)
    memory = x.new_empty(size, *laid.shape[1:])
    with torch.cuda.device_of(x):
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            mixed = memory[: len(x[part])]
            mix(laid, some(attentions, part), groups, mixed)
            convolve(x[part], mixed, y[part], tuple(weight.shape[3:]), geometry)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    attentions: Attentions,
    geometry: Geometry,
    gradients: tuple[Tensor, ...],
    workspace: int,
) -> None:
    """Write the gradients of x, weight and attentions into `gradients`; one without elements is not needed."""
    d_x, d_weight, *d_attentions = gradients
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    (laid, groups), taps = lay(weight, geometry.groups), tuple(weight.shape[3:])
    size = samples_at_once(len(x), weight, workspace)
    memory = x.new_empty(size, *laid.shape[1:])
    d_laid = laid.new_zeros((split_batch(laid, groups, size), *laid.shape), dtype=sum_dtype(x))
    with torch.cuda.device_of(x):
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            mixed = memory[: len(x[part])]
            if d_x.numel():
                mix(laid, some(attentions, part), groups, mixed)
                convolve(grad[part], mixed, d_x[part], taps, geometry, transposed=True)
            if any(d.numel() for d in gradients[1:]):
                convolve_gradient(grad[part], x[part], mixed, taps, geometry)  # over the kernels, which have served
                found = mix_gradient(mixed, laid, some(attentions, part), groups, d_laid)
                for d, d_part in zip(d_attentions, found, strict=True):
                    if d.numel() and d_part is not None:
                        d[part] = d_part.view_as(d[part])
    if d_weight.numel():
        n, filters, channels = weight.shape[:3]
        d_weight.copy_(d_laid.sum(0).view(n, -1, filters, channels).permute(0, 2, 3, 1).view_as(d_weight))


def samples_at_once(batch: int, weight: Tensor, workspace: int) -> int:
    """Return how many samples to mix at once: equal parts of the batch whose mixed kernels fit in the workspace."""
    most = max(1, workspace // (weight[0].numel() * weight.element_size()))
    return max(1, triton.cdiv(batch, max(1, triton.cdiv(batch, most))))


def lay(weight: Tensor, groups: int) -> tuple[Tensor, int]:
    """W as (n, k, O, C/g), and its groups; the filters of a depth-wise kernel lie where channels do, in one group."""
    laid = weight.flatten(3).permute(0, 3, 1, 2).contiguous()
    n, taps, filters, channels = laid.shape
    depthwise = is_depthwise(channels * groups, filters, groups)
    return (laid.view(n, taps, 1, filters), 1) if depthwise else (laid, groups)


def some(attentions: Attentions, part: slice) -> Attentions:
    """Return the attentions of a part of the batch."""
    return Attentions(*(None if a is None else a[part].contiguous() for a in attentions))


def mix(weight: Tensor, attentions: Attentions, groups: int, mixed: Tensor) -> None:
    """Mix W, (n, k, O, C/g), by the attentions of some samples into `mixed`, (B, k, O, C/g)."""
    (n, taps, filters, channels), batch = weight.shape, len(mixed)
    splits = split_batch(weight, groups, batch)
    kernels.mix_kernel[(math.prod(mixing_grid(weight, groups)), splits)](
        weight, *attentions, mixed, batch, triton.cdiv(batch, splits), n, taps, groups, filters // groups, channels,
        **mixing_blocks(weight, groups), SUM=sum_type(weight),
    )  # fmt: skip


def mix_gradient(
    grad: Tensor, weight: Tensor, attentions: Attentions, groups: int, d_weight: Tensor
) -> list[Tensor | None]:
    """Gradients of the attentions of some samples, given that of their mixed kernels, (B, k, O, C/g).

    What is W's is added to d_weight, (splits, n, k, O, C/g), still to be summed over its first axis.
    """
    (n, taps, filters, channels), batch = weight.shape, len(grad)
    outer, of_filters, of_channels = mixing_grid(weight, groups)
    tiles, splits = outer * of_filters * of_channels, len(d_weight)
    rows = ((tiles, n), (tiles // taps, taps), (taps * of_filters, groups * channels), (taps * of_channels, filters))
    partial = [
        None if attention is None else d_weight.new_empty(batch, *shape)
        for attention, shape in zip(attentions, rows, strict=True)
    ]
    kernels.mix_gradient_kernel[(tiles, splits)](
        grad, weight, *attentions, d_weight, *partial,
        batch, triton.cdiv(batch, splits), n, taps, groups, filters // groups, channels,
        **mixing_blocks(weight, groups), SUM=sum_type(weight),
    )  # fmt: skip
    return [None if sums is None else sums.sum(1) for sums in partial]


def convolve(
    x: Tensor, mixed: Tensor, y: Tensor, kernel_size: tuple[int, ...], geometry: Geometry, transposed: bool = False
) -> None:
    """Convolve each sample of x with its mixed kernel into y; transposed, carry the gradient x of the output to y."""
    maps, constants = (*x.shape[2:], *y.shape[2:]), kernel_constants(kernel_size, geometry)
    batch, width = y.shape[0], y.shape[1] // geometry.groups
    depth, positions = x.shape[1] // geometry.groups, math.prod(y.shape[2:])
    if is_depthwise(x.shape[1], y.shape[1], geometry.groups):
        blocks = depthwise_blocks(positions, y.shape[1])
        grid = (batch * triton.cdiv(y.shape[1], blocks["BLOCK_C"]) * triton.cdiv(positions, blocks["BLOCK_M"]),)
        kernels.depthwise_kernel[grid](
            x, mixed, y, *maps, y.shape[1], **constants, TRANSPOSED=transposed, **blocks, SUM=sum_type(x)
        )
        return
    # Transposed, the rows of one phase of the stride meet the same taps; which ones is plain without dilation.
    steps = [s if transposed and d == 1 else 1 for s, d in zip(geometry.stride, geometry.dilation, strict=True)]
    positions = math.prod(triton.cdiv(extent, step) for extent, step in zip(y.shape[2:], steps, strict=True))
    cut = product_blocks(positions, width, depth, x)
    tiles = triton.cdiv(positions, cut["BLOCK_M"]) * triton.cdiv(width, cut["BLOCK_N"])
    kernels.conv_kernel[(batch * geometry.groups * math.prod(steps) * tiles,)](
        x, mixed, y, *maps, geometry.groups, depth, width, **constants, TRANSPOSED=transposed,
        STEP_H=steps[0], STEP_W=steps[1], **cut,
    )  # fmt: skip


def convolve_gradient(
    grad: Tensor, x: Tensor, d_mixed: Tensor, kernel_size: tuple[int, ...], geometry: Geometry
) -> None:
    """Write the gradient of each sample's mixed kernel into d_mixed, (B, k, O, C/g), given that of the output."""
    maps, constants = (*x.shape[2:], *grad.shape[2:]), kernel_constants(kernel_size, geometry)
    (batch, filters), channels, positions = grad.shape[:2], x.shape[1], math.prod(grad.shape[2:])
    if is_depthwise(channels, filters, geometry.groups):
        blocks = depthwise_blocks(positions, channels) | {"TAPS": triton.next_power_of_2(math.prod(kernel_size))}
        kernels.depthwise_gradient_kernel[(batch * triton.cdiv(channels, blocks["BLOCK_C"]),)](
            grad, x, d_mixed, *maps, channels, **constants, **blocks, SUM=sum_type(x)
        )
        return
    filters, channels = filters // geometry.groups, channels // geometry.groups
    cut = product_blocks(filters, channels, positions, x)
    tiles = triton.cdiv(filters, cut["BLOCK_M"]) * triton.cdiv(channels, cut["BLOCK_N"])
    kernels.conv_gradient_kernel[(batch * geometry.groups * math.prod(kernel_size) * tiles,)](
        grad, x, d_mixed, *maps, geometry.groups, filters, channels, **constants, **cut
    )


def split_batch(weight: Tensor, groups: int, batch: int) -> int:
    """Into how many parts mixing splits the batch."""
    return min(batch, triton.cdiv(PROGRAMS, math.prod(mixing_grid(weight, groups))))


def mixing_blocks(weight: Tensor, groups: int) -> dict[str, int]:
    """Return the block of W, (n, k, O, C/g), that one program mixes."""
    n, _, filters, channels = weight.shape
    held = triton.next_power_of_2(n)
    block_c = min(64, triton.next_power_of_2(channels))
    block_o = min(triton.next_power_of_2(filters // groups), max(1, HELD // (max(2, held) * block_c)))
    return {"N": held, "BLOCK_O": block_o, "BLOCK_C": block_c}


def mixing_grid(weight: Tensor, groups: int) -> tuple[int, int, int]:
    """Taps and groups, blocks of filters, blocks of channels."""
    blocks = mixing_blocks(weight, groups)
    _, taps, filters, channels = weight.shape
    return taps * groups, triton.cdiv(filters // groups, blocks["BLOCK_O"]), triton.cdiv(channels, blocks["BLOCK_C"])


def is_depthwise(channels: int, filters: int, groups: int) -> bool:
    """Return whether each group is one channel and one filter."""
    return channels == filters == groups


def product_blocks(rows: int, cols: int, depth: int, like: Tensor) -> dict[str, Any]:
    """Blocks of a (rows, depth) times (depth, cols) product: up to 128 x 128, and 128 bytes of depth a step."""
    block_m, block_n = (min(128, max(16, triton.next_power_of_2(size))) for size in (rows, cols))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": max(16, min(128 // like.element_size(), triton.next_power_of_2(depth))),
        "SUM": sum_type(like),
        "PRECISION": "tf32x3",  # of float32 alone: on matrix units, and nearly as exact as without
        "num_warps": 8 if block_m * block_n > 128 * 64 else 4,
        "num_stages": 3,
    }


def depthwise_blocks(positions: int, channels: int) -> dict[str, int]:
    """Blocks of 2048 numbers, wide enough in channels for whole cache lines."""
    block_c = min(64, triton.next_power_of_2(channels))
    return {"BLOCK_M": min(triton.next_power_of_2(positions), 2048 // block_c), "BLOCK_C": block_c}


def kernel_constants(kernel_size: tuple[int, ...], geometry: Geometry) -> dict[str, int]:
    """Sizes of the kernel, stride, padding and dilation, for which a kernel is compiled."""
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    return dict(zip(names, (*kernel_size, *geometry.stride, *geometry.padding, *geometry.dilation), strict=True))


def sum_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype to sum in."""
    return torch.promote_types(like.dtype, torch.float32)


def sum_type(like: Tensor) -> tl.dtype:
    """Return the same as a type of Triton's."""
    return tl.float64 if like.dtype == torch.float64 else tl.float32
