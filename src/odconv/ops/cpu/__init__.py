"""The compiled backend for the CPU: C++ mixes a tile of kernels and multiplies it while it is in the cache.

A wheel for Linux brings it along. Else it is compiled at its first use, in about half a minute, kept in the
cache folder (``$ODCONV_CACHE``, else ``$XDG_CACHE_HOME/odconv``, else ``~/.cache/odconv``), and loaded from there
ever after; library.py sees to that. Where there is no compiler, or the processor is neither x86 with AVX2 nor 64-bit
ARM, or the system is not Linux, the backends in plain PyTorch give the same results, only slower.
``ODCONV_CPU_KERNEL=0`` asks for them.
"""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from odconv.ops import flops
from odconv.ops.contract import Attentions, Geometry, is_channels_last, is_transformed, output_size
from odconv.ops.recompute import (
    Convolve,
    depthwise_gradients,
    differentiable_gradients,
    grouped_backward,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)  # summed in float32
LARGE_PLANE = 512
"""Positions of a depth-wise layer's map from which more than one sample is faster here than as groups.

Rows: layers_inference.csv, batch 8, "144->144 28x28 k3 s1 g144" on one side, "384->384 14x14 k3 s1 g384" on the other.
"""
WIDE_GROUP = 16
"""Channels and filters of a group that fill a vector of 64 bytes in float32; narrower groups would leave it empty."""
ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? kernel, Tensor? spatial, Tensor? channel, Tensor? filter, "
    "int[] stride, int[] padding, int[] dilation, int groups"
)
OPERATORS = torch.library.Library("odconv", "FRAGMENT")  # what they are is known before they are compiled
OPERATORS.define(f"conv({ARGUMENTS}, Tensor? bias) -> Tensor")
OPERATORS.define(
    f"conv_fused({ARGUMENTS}, Tensor? bias, str activation, bool means, Tensor? packed) -> (Tensor, Tensor)"
)
CELLS = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"
OPERATORS.define(f"conv_cells(Tensor x, Tensor cells, Tensor shares, int out_channels, {CELLS}) -> Tensor")
OPERATORS.define(
    f"conv_cells_backward(Tensor grad, Tensor x, Tensor cells, Tensor shares, {CELLS}, bool to_x, bool to_kernels) "
    "-> (Tensor, Tensor, Tensor)"
)
OPERATORS.define("pack(Tensor weight, int groups) -> Tensor")
OPERATORS.define("pool(Tensor x) -> Tensor")
OPERATORS.define(
    f"conv_backward(Tensor grad, {ARGUMENTS}, bool to_x, bool to_weights) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
OPERATORS.define(
    "attend(Tensor pooled, Tensor? fc, Tensor[] norm, int groups, float eps, Tensor[] weights, Tensor[] biases, "
    "int[] sizes, float[] gains, int softmax, Tensor? temperature) -> Tensor[]"
)


def available() -> bool:
    """Return whether the compiled kernel can be used here; compile it where it has not been yet."""
    return _load()


def threads() -> int:
    """Return how many threads PyTorch computes with here."""
    return torch.get_num_threads()


for known in (available, threads):
    # what torch.compiler.assume_constant_result would set, were it not for the second that importing it takes
    known._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _load() -> bool:
    if os.environ.get("ODCONV_CPU_KERNEL") == "0" or sys.platform != "linux":
        return False
    from odconv.ops.cpu import library  # which is for Linux

    if library.variant() is None:
        return False
    try:
        library.load()
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"odconv's CPU kernel could not be compiled, slower backends in plain PyTorch are used instead: {error}. "
            "Set ODCONV_CPU_KERNEL=0 to use them without this warning.",
            stacklevel=2,
        )
        return False
    return True


def takes(x: Tensor) -> bool:
    """Return whether the compiled kernel can compute with this tensor."""
    return x.device.type == "cpu" and x.dtype in DTYPES and x.numel() > 0 and not is_transformed() and available()


def fits(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether the compiled kernel can compute this, and does it faster than the other backends."""
    groups = geometry.groups
    if is_depthwise(weight, groups) and runs_over_channels(x):
        return groups >= WIDE_GROUP and takes(x)
    if is_depthwise(weight, groups):  # vectors run over the positions of a plane
        large = max(geometry.stride) == 1 and math.prod(x.shape[2:]) >= LARGE_PLANE
        return x.dim() < 5 and x.is_contiguous() and (x.shape[0] == 1 or large) and takes(x)
    # Else they run over the filters of a group: a narrow group would leave them empty.
    return (groups == 1 or min(weight.shape[1] // groups, weight.shape[2]) >= WIDE_GROUP) and takes(x)


@cache
def has_bfloat16() -> bool:
    """Return whether the processor multiplies numbers in bfloat16: by AVX-512's products, or on matrix units (AMX)."""
    return torch.cpu._is_avx512_bf16_supported()


@cache
def has_matrix_units() -> bool:
    """Return whether the processor multiplies matrices in bfloat16 (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def computes_in_float32(dtype: torch.dtype) -> bool:
    """Return whether dense layers of 16 bits are computed in float32: products are of bfloat16 alone."""
    return dtype in HALF and not (dtype == torch.bfloat16 and has_bfloat16())


def is_depthwise(weight: Tensor, groups: int) -> bool:
    """Return whether each group has one channel and one filter."""
    return groups == weight.shape[1] and weight.shape[2] == 1


def runs_over_channels(x: Tensor) -> bool:
    """Return whether the vectors of a depth-wise layer run over channels: on channels-last maps, and in 16 bits."""
    return x.dtype in HALF or is_channels_last(x)


def convolve(
    x: Tensor, weight: Tensor, attentions: Attentions, geometry: Geometry, bias: Tensor | None = None
) -> Tensor:
    """Mix and multiply tile by tile, in C++, and add a bias, (O) or (B, O), to what is written.

    Beside x and weight of 16 bits the attentions may be in float32, in which they are multiplied.
    """
    if not takes(x):
        raise ValueError(
            "backend 'cpu' needs x on the CPU in floating point, at least one sample, and a C++ compiler, "
            f"got x of shape {tuple(x.shape)} on {x.device} in {x.dtype}"
        )
    y: Tensor = torch.ops.odconv.conv(
        x,
        weight.contiguous(),
        *(None if a is None else a.contiguous() for a in attentions),
        *geometry,
        None if bias is None else bias.reshape(-1, weight.shape[1]).contiguous(),
    )
    return y


def convolve_fused(
    x: Tensor,
    weight: Tensor,
    attentions: Attentions,
    geometry: Geometry,
    bias: Tensor | None,
    activation: str,
    means: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolve as :func:`convolve` and activate what is written, without gradients.

    The kernels may come packed besides, see :func:`pack`.

    Returns:
        (B, O, *map), and, where `means` are asked for, the mean of each of its maps, (B, O), in float32 or float64.
    """
    y, found = torch.ops.odconv.conv_fused(
        x,
        weight.contiguous(),
        *(None if a is None else a.contiguous() for a in attentions),
        *geometry,
        None if bias is None else bias.reshape(-1, weight.shape[1]).contiguous(),
        activation,
        means,
        packed,
    )
    return y, found if means else None


def fits_cells(x: Tensor, cells: Tensor, dtype: torch.dtype, groups: int) -> bool:
    """Return whether the compiled kernel can mix cells, (n, co, ci, *window), and convolve in `dtype`."""
    whole = groups == 1 and math.prod(cells.shape[3:]) == 1 and min(cells.shape[1:3]) >= WIDE_GROUP
    return whole and dtype not in HALF and takes(x)


def convolve_cells(x: Tensor, cells: Tensor, shares: Tensor, kernel_shape: Sequence[int], geometry: Geometry) -> Tensor:
    """Convolve each sample with a kernel of cells, which are mixed a tile at a time; see :func:`cells_backward`.

    Args:
        x: input, (B, C, *map).
        cells: (n, co, ci, 1, ...).
        shares: (B, m, n), a row for each piece of a kernel: of each tap, block of filters and block of channels.
        kernel_shape: (O, C, *kernel_size).
        geometry: stride, padding and dilation.
    """
    flops.watch()
    filters, _, *taps = kernel_shape
    y: Tensor = torch.ops.odconv.conv_cells(x, cells.contiguous(), shares.contiguous(), filters, taps, *geometry[:3])
    return y


def cells_backward(
    grad: Tensor,
    x: Tensor,
    cells: Tensor,
    shares: Tensor,
    taps: Sequence[int],
    geometry: Geometry,
    to_x: bool,
    to_kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, and of cells and shares; what is not asked for is empty."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.odconv.conv_cells_backward(
        grad, x, cells.contiguous(), shares.contiguous(), taps, *geometry[:3], to_x, to_kernels
    )
    return found


def pack(weight: Tensor, groups: int) -> Tensor | None:
    """Return kernels (n, O, C/groups, *k) in the order that the compiled kernel computes with, for many calls.

    None where it takes them as they are: depth-wise, and in dtypes that the processor does not multiply in 16 bits.
    """
    if weight.dtype not in HALF or not takes(weight):
        return None
    packed: Tensor = torch.ops.odconv.pack(weight.detach().contiguous(), groups)
    return packed if packed.numel() else None


def pool(x: Tensor) -> Tensor:
    """Return the mean of each map of x, (B, C, *map) -> (B, C), in float32 or float64, without gradients."""
    flops.watch()
    pooled: Tensor = torch.ops.odconv.pool(x)
    return pooled


class Layers(NamedTuple):
    """The numbers of an attention behind its pool.

    Attributes:
        fc: weight of the hidden layer, (h, C, ...), or None.
        norm: what follows it, each (h): nothing; a bias; weight and bias of group norm; or running mean, running
            variance, weight and bias of batch norm.
        groups: of group norm.
        eps: what a norm adds to the variance.
        weights: a weight (size, h, ...) for each head, or one of all heads below each other, in the input's dtype.
        biases: a bias (size) for each weight.
    """

    fc: Tensor | None
    norm: list[Tensor]
    groups: int
    eps: float
    weights: list[Tensor]
    biases: list[Tensor]


def attend(
    pooled: Tensor, layers: Layers, sizes: list[int], gains: list[float], softmax: int, temperature: Tensor | None
) -> list[Tensor]:
    """Compute an attention behind its pool, without gradients.

    Args:
        pooled: means of what the attention looks at, (B, C), in float32 or float64.
        layers: the attention's numbers.
        sizes: how many outputs each head has.
        gains: what the gates of each head are multiplied by.
        softmax: number of the head whose gates are a softmax, or -1; those of the others are sigmoids.
        temperature: divisor of all logits, or None.

    Returns:
        The gates of each head, (B, size), in float32 or float64.
    """
    flops.watch()
    gates: list[Tensor] = torch.ops.odconv.attend(pooled, *layers, sizes, gains, softmax, temperature)
    return gates


def backward_per_sample(
    grad: Tensor, x: Tensor, kernels: Tensor, geometry: Geometry, to_x: bool, to_kernels: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of a kernel for each sample, (B, O, C/g, *k); what is not asked for is empty."""
    none = (None,) * 4
    found = torch.ops.odconv.conv_backward(grad, x, kernels.contiguous(), *none, *geometry, to_x, to_kernels)
    return found[0], found[1]


def depthwise_backward(x: Tensor, groups: int) -> Convolve:
    """Return what gives the gradients of a depth-wise layer with a kernel for each sample."""
    return backward_per_sample if groups >= WIDE_GROUP and runs_over_channels(x) and takes(x) else grouped_backward


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, stride, padding, dilation, groups, bias = inputs
    ctx.samples = None if bias is None else bias.shape[0]
    ctx.save_for_backward(*tensors)
    ctx.geometry = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:6]
    if torch.is_grad_enabled():
        found = differentiable_gradients(grad, tensors, ctx.geometry, needs)
    elif is_depthwise(tensors[1], ctx.geometry.groups):
        differentiate = depthwise_backward(tensors[0], ctx.geometry.groups)
        found = depthwise_gradients(grad, tensors, ctx.geometry, needs, differentiate)
    else:
        found = torch.ops.odconv.conv_backward(grad, *tensors, *ctx.geometry, needs[0], any(needs[1:]))
    to_bias = None
    if ctx.needs_input_grad[10]:
        to_bias = grad.reshape(*grad.shape[:2], -1).sum(2)  # PyTorch has no rule to batch `flatten` in here
        to_bias = to_bias.sum(0, keepdim=True) if ctx.samples == 1 else to_bias
    return *(tensor if need else None for tensor, need in zip(found, needs, strict=True)), *(None,) * 4, to_bias


def empty_output(
    x: Tensor,
    filters: int,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return what an operator tells torch.compile of its output: its shape, (B, filters, *map), and x's layout."""
    shape = (x.shape[0], filters, *output_size(x.shape[2:], taps, stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x))


def _fake(
    x: Tensor,
    weight: Tensor,
    kernel: Tensor | None,
    spatial: Tensor | None,
    channel: Tensor | None,
    filter: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: Tensor | None,
) -> Tensor:
    return empty_output(x, weight.shape[1], weight.shape[3:], stride, padding, dilation)


def _fake_fused(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *arguments, _, means, _ = rest
    y = _fake(x, weight, *arguments)
    found = x.new_empty(y.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32)) if means else x.new_empty(0)
    return y, found


def _fake_cells(
    x: Tensor,
    cells: Tensor,
    shares: Tensor,
    filters: int,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return empty_output(x, filters, taps, stride, padding, dilation)


def _fake_cells_backward(grad: Tensor, x: Tensor, cells: Tensor, shares: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, to_x, to_kernels = rest
    wanted = (to_x, x), (to_kernels, cells), (to_kernels, shares)
    return tuple(torch.empty_like(like) if asked else x.new_empty(0) for asked, like in wanted)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, to_x, to_weights = rest
    batch = x.shape[0]
    shapes = ((batch, weight.shape[0]), (batch, *weight.shape[3:]), x.shape[:2], (batch, weight.shape[1]))
    attentions = rest[: len(shapes)]
    dtypes = [x.dtype if attention is None else attention.dtype for attention in attentions]
    sums = (x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    weights = [torch.empty_like(weight), *sums]
    return (
        torch.empty_like(x) if to_x else x.new_empty(0),
        *(weight if to_weights else weight.new_empty(0) for weight in weights),
    )


def _fake_pool(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_attend(pooled: Tensor, *rest: Any) -> list[Tensor]:
    *_, sizes, _, _, _ = rest
    return [pooled.new_empty(pooled.shape[0], size) for size in sizes]


torch.library.register_fake("odconv::conv", _fake)
torch.library.register_fake("odconv::conv_fused", _fake_fused)
torch.library.register_fake("odconv::conv_cells", _fake_cells)
torch.library.register_fake("odconv::conv_cells_backward", _fake_cells_backward)
torch.library.register_fake("odconv::conv_backward", _fake_backward)
torch.library.register_fake("odconv::attend", _fake_attend)
torch.library.register_fake("odconv::pool", _fake_pool)
torch.library.register_autograd("odconv::conv", _backward, setup_context=_save)
