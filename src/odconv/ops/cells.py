"""Kernels that are put together of cells: each of their pieces is a mixture of cells, which layers may share."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from odconv.ops import cpu
from odconv.ops.contract import Attentions, Geometry, is_exporting
from odconv.ops.dynamic_conv import add_bias, compute_dtype
from odconv.ops.mixing import checked, mixed_conv
from odconv.ops.policy import Choice, is_better_unrounded_by_tiles, is_differentiated, log_choice
from odconv.ops.reach import within_reach
from odconv.ops.recompute import Step, Tensors, apply

BY_TILES = Choice("cpu", "the compiled kernel mixes cells a tile at a time")


def assemble(cells: Tensor, shares: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return a kernel for each sample, (B, *shape), of cells, (n, co, ci, *window), and shares, (B, m, n).

    The m pieces are in the order taps, blocks of filters, blocks of channels; the last varies first.
    """
    assert shares is not None
    (filters, channels), (outer, inner, *window) = shape[:2], cells.shape[1:]
    within = math.prod(window)
    pieces = (shares @ cells.flatten(1)).reshape(
        -1, math.prod(shape[2:]) // within, filters // outer, channels // inner, outer, inner, within
    )
    return pieces.permute(0, 2, 4, 3, 5, 1, 6).reshape(-1, *shape)


def cut(kernel: Tensor, cell: Sequence[int]) -> Tensor:
    """Return the m pieces of a kernel, (O, C/groups, *k), in the shape of a cell, (co, ci, *window)."""
    outer, inner, *window = cell
    within = math.prod(window)
    pieces = kernel.reshape(kernel.shape[0] // outer, outer, kernel.shape[1] // inner, inner, -1, within)
    return pieces.permute(4, 0, 2, 1, 3, 5).reshape(-1, *cell)


def cell_conv(
    x: Tensor,
    cells: Tensor,
    shares: Tensor,
    kernel_shape: Sequence[int],
    *,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve each sample with a kernel that is put together of cells.

    The result is that of :func:`~odconv.ops.mixing.mixed_conv` with :func:`assemble`; where the compiled kernel takes
    the shapes, no sample's kernel is ever in memory.

    Args:
        x: input, (B, C, *map).
        cells: (n, co, ci, *window).
        shares: what each piece of each sample's kernel takes of the cells, (B, m, n).
        kernel_shape: (O, C/groups, *kernel_size).
        bias, stride, padding, dilation, groups: as in :func:`per_sample_conv`.

    Returns:
        (B, O, *map).

    Raises:
        ValueError, TypeError: as :func:`~odconv.ops.mixing.mixed_conv`.
    """
    options: dict[str, Any] = {
        "bias": bias, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups
    }  # fmt: skip
    mix, dtype = partial(assemble, shape=kernel_shape), compute_dtype(x, cells)
    # What torch.compile differentiates is to be made of operations that it knows.
    compiled = torch.compiler.is_compiling() and torch.is_grad_enabled()
    by_tiles = not (compiled or is_exporting())
    if (
        by_tiles
        and cells.dtype == torch.float32
        and is_better_unrounded_by_tiles(kernel_shape[2:], dtype)
        and cpu.fits_cells(x, cells, torch.float32, groups)
    ):
        with torch.autocast(x.device.type, enabled=False):
            return cell_conv(x.float(), cells, shares, kernel_shape, **options).to(dtype)
    if not (by_tiles and cpu.fits_cells(x, cells, dtype, groups)):
        return mixed_conv(x, mix, cells, shares, kernel_shape, **options)
    attentions = Attentions(shares, None, None, None)
    x, cells, attentions, geometry = checked(
        x, cells, attentions, kernel_shape, bias, stride, padding, dilation, groups
    )
    log_choice(BY_TILES, x, cells)
    if reach := within_reach(x.shape[2:], kernel_shape[2:], geometry):
        rows = reach.cut(shares.unflatten(1, (*kernel_shape[2:], -1)), 1)
        kernel_shape, geometry = (*kernel_shape[:2], *rows.shape[1:-2]), reach.geometry
        attentions = attentions._replace(kernel=rows.flatten(1, -2).to(cells.dtype))
        mix = partial(assemble, shape=kernel_shape)

    def run(x: Tensor, cells: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
        assert attentions.kernel is not None
        return cpu.convolve_cells(x, cells, attentions.kernel, kernel_shape, geometry)

    if is_differentiated(x, cells, *attentions):
        step = Step(run, geometry, 0, False, mix, gradients=partial(gradients, kernel_shape[2:]))
        return add_bias(apply(step, x, cells, attentions), bias)
    return add_bias(run(x, cells, attentions, geometry), bias)


def gradients(
    taps: Sequence[int], grad: Tensor, tensors: Tensors, geometry: Geometry, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x, the cells and the shares, tile by tile as well."""
    x, cells, shares, *_ = tensors
    to_x, to_cells, to_shares, *others = needs
    found = cpu.cells_backward(grad, x, cells, shares, taps, geometry, to_x, to_cells or to_shares)
    return [*(one if need else None for one, need in zip(found, needs, strict=False)), *(None for _ in others)]
