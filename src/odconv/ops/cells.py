"""Kernels that are put together of cells: each of their pieces is a mixture of cells, which layers may share."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from odconv.ops import cpu
from odconv.ops.contract import Attentions, Geometry, is_exporting
from odconv.ops.dynamic_conv import compute_dtype
from odconv.ops.mixing import mixed_conv
from odconv.ops.policy import Choice, log_choice

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

    def by_tiles(x: Tensor, cells: Tensor, attentions: Attentions, geometry: Geometry) -> Tensor:
        assert attentions.kernel is not None
        log_choice(BY_TILES, x, cells)
        return cpu.convolve_cells(x, cells, attentions.kernel, kernel_shape, geometry)

    # What torch.compile differentiates is to be made of operations that it knows.
    compiled = torch.compiler.is_compiling() and torch.is_grad_enabled()
    direct = not compiled and not is_exporting() and cpu.fits_cells(x, cells, compute_dtype(x, cells), groups)
    return mixed_conv(
        x, partial(assemble, shape=kernel_shape), cells, shares, kernel_shape, bias=bias, stride=stride,
        padding=padding, dilation=dilation, groups=groups, run=by_tiles if direct else None,
    )  # fmt: skip
