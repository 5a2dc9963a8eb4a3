"""Which backend computes a call: one policy for running, one for exporting, and the limits that measurements set.

Every limit names the rows of benchmarks/results it comes from; ``odconv.explain`` says what is chosen for a layer.
"""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from odconv.ops import cpu
from odconv.ops.contract import (
    Geometry,
    is_exported_sample,
    is_exporting,
    is_traced,
    is_transformed,
    output_size,
    surely,
)
from odconv.ops.cpu import samples
from odconv.ops.reach import Reach, count_pairs, within_reach

FEW_POSITIONS = 64
"""Kernels times positions up to which n full products beat mixing a kernel for each sample in plain PyTorch.

Rows: layers_small_maps.csv, n = 4, batch 64, "shared" against "product": "128->128 4x4 k3 s1 g1" below, and
"64->64 8x8 k3 s1 g1" above.
"""
MANY_SAMPLES = 8
"""Samples from which n full products at one position beat the compiled kernel for the CPU, which mixes.

It is for dtypes of 16 bits; the others have their kernel over samples there.
Rows: layers_small_maps.csv, n = 4, batch 8 and 64, training, "shared" against "cpu": "256->512 2x2 k3 s2 g1" below, and
with more positions, "256->256 2x2 k3 s1 g1", above.
"""
MOST_POSITIONS = 25
"""Positions up to which the compiled kernel over samples is asked for: its working space grows with them."""
LEAST_SAMPLES = 8
"""Samples below which most of its vectors would be empty.

Rows of both and of `is_better_by_samples`: layers_small_maps.csv, "samples" against "cpu": n = 1, batch 16 and more,
"128->128 4x4 k3 s1 g1" above in training, and "64->64 8x8 k3 s1 g1" below; n = 4, batch 64, "256->256 2x2 k3 s1 g1"
above, and "128->128 4x4 k3 s1 g1" below.
"""
LARGE_KERNEL = 2**20
"""Numbers of a lone 1x1 kernel from which scaling a small map beats scaling the kernel, for a batch of one.

Rows: layers_inference.csv, n = 1, batch 1, "2048->512 7x7 k1 s1 g1" and "512->2048 7x7 k1 s1 g1".
"""

LARGE_MAP = 2048
"""Positions from which kernels of one tap train in bfloat16 as matrix products; see `is_better_in_plain`."""

EAGER = ("single", "shared", "product", "pointwise", "grouped")
"""Backends in plain PyTorch, which autograd would differentiate by keeping every mixed kernel."""

logger = logging.getLogger("odconv.ops")


class Choice(NamedTuple):
    """A backend of the operator, and why it was chosen."""

    backend: str
    why: str


def choose(x: Tensor, weight: Tensor, geometry: Geometry, differentiated: bool, per_sample: bool = False) -> Choice:
    """Return the cheapest backend for these shapes and this device.

    Args:
        x: input, (B, C, *map).
        weight: n kernels, or one for each sample, (n or B, O, C/groups, *kernel_size).
        geometry: stride, padding, dilation and groups.
        differentiated: whether autograd wants gradients.
        per_sample: whether weight has one kernel for each sample.
    """
    if is_traced():
        return Choice("traced", "torch.jit.trace records sizes as they are, but for those of batch and map")
    n = None if per_sample else weight.shape[0]
    if is_exporting():
        return choose_for_export(x, weight, geometry, n)
    if is_better_by_samples(x, weight, geometry, n, x.dtype, differentiated):
        return Choice("samples", "few positions: all samples meet the same kernels, and none is mixed")
    return choose_for_run(x, weight, geometry, n, differentiated)


def choose_for_export(x: Tensor, weight: Tensor, geometry: Geometry, n: int | None) -> Choice:
    """Return the backend of an exported graph, in which the batch may be no number of groups; n is None per sample."""
    dense = "shared" if n == 1 else "product"
    if not is_exported_sample(x):
        return Choice(dense, "an exported graph serves every batch")
    if math.prod(weight.shape[3:]) > 1 and surely(is_small(x, weight, geometry)):
        return Choice(dense, "the small map's columns are fewer numbers than the kernel, whose taps are scaled")
    return Choice("single", "the exported batch is always one")


def choose_for_run(x: Tensor, weight: Tensor, geometry: Geometry, n: int | None, differentiated: bool) -> Choice:
    """Return the backend of a call that computes now, or is compiled; n is None per sample."""
    if x.shape[0] == 0:
        return Choice("shared" if n == 1 else "product", "an empty batch is no number of groups")
    if differentiated and cpu.takes(x) and loses_gradients(x.shape[2:], weight.shape[3:], geometry, x.dtype):
        return Choice("cpu", "oneDNN leaves gradients of such kernels unwritten in bfloat16")
    if is_better_in_plain(x, weight, geometry, x.dtype, differentiated):
        return choose_plain(x, weight, geometry, n)
    one = positions_of(x, geometry) == 1
    products = one and n is not None and geometry.groups == 1
    # the batch is asked last: where torch.compile leaves it open, each question is another graph
    if (one and n in (1, None)) or (products and x.shape[0] >= MANY_SAMPLES) or not cpu.fits(x, weight, geometry):
        return choose_plain(x, weight, geometry, n)
    # A lone 1x1 kernel can do without a kernel per sample: a small map is scaled instead. On one thread PyTorch
    # does not take oneDNN for that, and takes twice as long. In 16 bits scaling a kernel costs less.
    lone = n == math.prod(weight.shape[3:]) == geometry.groups == 1 and is_small(x, weight, geometry)
    lone = lone and x.dtype not in cpu.HALF
    if lone and cpu.threads() > 1 and not differentiated and (x.shape[0] > 1 or weight.numel() >= LARGE_KERNEL):
        return Choice("shared", "one 1x1 kernel on a small map: the map is scaled, and no kernel")
    return Choice("cpu", "the compiled kernel for the CPU takes this shape and dtype")


def choose_plain(x: Tensor, weight: Tensor, geometry: Geometry, n: int | None) -> Choice:
    """Return the cheapest backend in plain PyTorch; n is None per sample.

    Mixed kernels cost |W| a sample and columns C * k * L: a map is unfolded where it has fewer positions than a group
    has filters. A depth-wise kernel has one filter a group, so it never is.
    """
    small = is_small(x, weight, geometry)
    products = x.dtype in cpu.HALF and x.device.type == "cpu" and is_pointwise(weight, geometry)
    if n == 1 and ((small and x.shape[0] == 1) or (products and positions_of(x, geometry) <= FEW_POSITIONS)):
        return Choice("shared", "one kernel: the small map's columns are scaled, and no kernel")
    if x.shape[0] == 1:
        return Choice("single", "a batch of one is one ordinary convolution")
    if products:
        return Choice("pointwise", "one tap: a matrix product for each sample")
    if not small:
        return Choice("grouped", "a large map, or few filters a group: unfolding would cost more than a group a sample")
    if n is not None and n * positions_of(x, geometry) <= FEW_POSITIONS:
        return Choice("shared", "so few positions that n products cost less than mixing a kernel for each sample")
    return Choice("shared" if n == 1 else "product", "a small map: its columns are cheap, and the products are dense")


def is_better_by_samples(
    x: Tensor, weight: Tensor, geometry: Geometry, n: int | None, dtype: torch.dtype, differentiated: bool
) -> bool:
    """Return whether the compiled kernel whose vectors run over samples beats the one that mixes; n is None per sample.

    It multiplies n kernels with the pairs of a position and a tap that meet the map, the other one mixes every tap and
    multiplies it with every position. The less it saves, and in inference, the more samples it needs.
    """
    if n is None or geometry.groups > 1:
        return False
    extents, kernel_size = x.shape[2:], weight.shape[3:]
    taps, positions = math.prod(kernel_size), math.prod(output_size(extents, kernel_size, *geometry[:3]))
    if positions > MOST_POSITIONS or (taps == 1 < positions) or not samples.takes(x, dtype):
        return False
    products = n * count_pairs(extents, kernel_size, geometry)
    mixing = taps * (positions + (n if n > 1 else 0))
    scale = positions * products / mixing
    least = math.ceil(scale if differentiated else 2 * scale + 4)
    return products <= 2 * mixing and x.shape[0] >= max(LEAST_SAMPLES, least)


def reach_of(
    x: Tensor, weight: Tensor, geometry: Geometry, n: int | None, dtype: torch.dtype, differentiated: bool
) -> Reach | None:
    """Return the taps to cut a kernel down to before a backend is chosen; None where it stays whole."""
    reach = within_reach(x.shape[2:], weight.shape[3:], geometry)
    if reach and is_better_by_samples(x, weight, geometry, n, dtype, differentiated):
        return None  # that kernel passes over taps by itself
    return reach


def log_choice(choice: Choice, x: Tensor, weight: Tensor) -> None:
    """Tell the logger which backend computes a call, and why."""
    if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
        shapes = tuple(x.shape), tuple(weight.shape)
        logger.debug("backend %s for x %s and weight %s: %s", choice.backend, *shapes, choice.why)


def choose_transposed(x: Tensor) -> Choice:
    """Return the backend of the transposed operator."""
    if is_traced():
        return Choice("traced", "torch.jit.trace records sizes as they are, but for those of batch and map")
    if is_exporting() and not is_exported_sample(x):
        return Choice("dense", "an exported graph serves every batch")
    if not is_exporting() and x.shape[0] == 0:
        return Choice("dense", "an empty batch is no number of groups")
    return Choice("grouped", "a kernel is mixed for each sample, and each sample is a group")


def positions_of(x: Tensor, geometry: Geometry) -> int:
    """Return about how many positions the output has."""
    return math.prod(x.shape[2:]) // math.prod(geometry.stride)


def is_small(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether a map has fewer positions than a group has filters."""
    return positions_of(x, geometry) < weight.shape[1] // geometry.groups


def is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    """Return whether a kernel has one tap, no groups and no padding."""
    return math.prod(weight.shape[3:]) == geometry.groups == 1 and not any(geometry.padding)


def is_better_in_plain(x: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype, differentiated: bool) -> bool:
    """Return whether PyTorch computes in bfloat16 faster than the compiled kernel, where both multiply it.

    That is so in training: on matrix units, and without them of kernels of one tap in batches of large maps.

    Rows: layers_autocast.csv, batch 16, "pointwise" against "cpu": "96->24 56x56 k1 s1 g1" above, and
    "144->32 28x28 k1 s1 g1" below.
    """
    depthwise = cpu.is_depthwise(weight, geometry.groups)
    if torch.compiler.is_compiling() or depthwise or dtype != torch.bfloat16 or not cpu.has_bfloat16():
        return False
    large = is_pointwise(weight, geometry) and positions_of(x, geometry) >= LARGE_MAP and x.shape[0] > 1
    return differentiated and (cpu.has_matrix_units() or large)


def is_better_unrounded(x: Tensor, weight: Tensor, geometry: Geometry, n: int | None, dtype: torch.dtype) -> bool:
    """Return whether a training in 16 bits computes a layer in float32, for which autocast need not round its kernels.

    Where the processor multiplies bfloat16, that is on few positions, of which float32 has a kernel over samples, and
    with fewer samples than kernels, all of which would be packed for them.

    Args:
        x, weight, geometry: those of the operator, before they are cast.
        n: kernels that are mixed; None if each sample has its own.
        dtype: what autocast wants.

    Rows: layers_autocast.csv, "float32" against "cpu": batch 16, "128->256 4x4 k3 s2 g1" below, and
    "64->128 8x8 k3 s2 g1" above; n = 4, batch 1, "576->160 7x7 k1 s1 g1" and "256->256 14x14 k3 s1 g1" below,
    "192->64 14x14 k1 s1 g1" and "128->128 28x28 k3 s1 g1" above.
    """
    if dtype not in cpu.HALF or weight.dtype != torch.float32 or x.shape[0] == 0:
        return False
    if cpu.is_depthwise(weight, geometry.groups) or not cpu.fits(x, weight, geometry):
        return False
    if cpu.computes_in_float32(dtype):
        return True
    positions = positions_of(x, geometry)
    small = positions <= (1 if is_pointwise(weight, geometry) else 4) * FEW_POSITIONS
    scarce = n is not None and x.shape[0] < n and small
    return not cpu.has_matrix_units() and (positions <= 8 or scarce)


def is_better_unrounded_by_tiles(taps: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether cells are mixed by tiles in float32 where autocast wants 16 bits, for which they need no rounding.

    Kernels of one tap are faster as products in bfloat16, where the processor has those.
    """
    if dtype != torch.bfloat16 or not cpu.has_bfloat16():
        return dtype in cpu.HALF
    return math.prod(taps) > 1 and not cpu.has_matrix_units()


def loses_gradients(map_size: Sequence[int], taps: Sequence[int], geometry: Geometry, dtype: torch.dtype) -> bool:
    """Return whether oneDNN, with AVX-512's bfloat16 and no AMX, leaves entries of the kernels' gradient unwritten.

    It does for taps that meet padding alone, and for some 3-d maps where all of them meet the map, those of two planes.
    """
    if dtype != torch.bfloat16 or torch.compiler.is_compiling() or not cpu.has_bfloat16() or cpu.has_matrix_units():
        return False
    sizes = zip(map_size, taps, output_size(map_size, taps, *geometry[:3]), *geometry[:3], strict=True)
    return len(taps) == 3 or any(
        not any(0 <= stride * at + dilation * tap - padding < extent for at in range(size))
        for extent, count, size, stride, padding, dilation in sizes
        for tap in range(count)
    )


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Return whether autograd will want gradients of these; compiled and exported graphs decide what to keep."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted and not (torch.compiler.is_compiling() or is_exporting() or is_transformed())
