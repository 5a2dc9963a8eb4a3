"""Which taps of a kernel reach the map at all: on maps smaller than its span, some meet padding alone."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from odconv.ops.contract import Geometry, is_exporting, output_size

FEW = 3
"""How many times fewer taps there must be to take them out of the kernels, of which the others are read as well.

Rows: layers_small_maps.csv, batch 4, "fewest taps" against "all taps": "512->512 1x1 k3 s1 g1" below, and
"256->512 2x2 k3 s2 g1", where four of nine are left, above.
"""


class Reach(NamedTuple):
    """The taps that meet the map, first and end of each axis, and the geometry of a kernel of these alone."""

    spans: list[tuple[int, int]]
    geometry: Geometry

    def cut(self, numbers: Tensor, axis: int) -> Tensor:
        """Return the numbers of these taps, which lie from that axis on."""
        for own, (first, end) in enumerate(self.spans, axis):
            numbers = numbers.narrow(own, first, end - first)
        return numbers


def within_reach(extents: Sequence[int], taps: Sequence[int], geometry: Geometry) -> Reach | None:
    """Return the taps that meet more than padding, such as one of nine on a map of 1 x 1.

    Args:
        extents: the map's.
        taps: the kernel's.
        geometry: how it moves.

    Returns:
        None where that is about all, and where torch.export may leave sizes open.
    """
    stride, padding, dilation, groups = geometry
    if is_exporting() or not any(padding):
        return None
    spans = [reached(*axis) for axis in zip(extents, taps, stride, padding, dilation, strict=True)]
    if FEW * math.prod([end - first for first, end in spans]) > math.prod(taps):
        return None
    margins = tuple(p - first * d for (first, _), p, d in zip(spans, padding, dilation, strict=True))
    return Reach(spans, Geometry(stride, margins, dilation, groups))


def count_pairs(extents: Sequence[int], taps: Sequence[int], geometry: Geometry) -> int:
    """Return how many pairs of an output position and a tap meet the map, and not padding alone."""
    sizes = output_size(extents, taps, *geometry[:3])
    axes = zip(extents, taps, sizes, *geometry[:3], strict=True)
    return math.prod([count_on_axis(*axis) for axis in axes])


def count_on_axis(extent: int, taps: int, positions: int, stride: int, padding: int, dilation: int) -> int:
    """Return the same of one axis."""
    inputs = [stride * at + dilation * tap - padding for at in range(positions) for tap in range(taps)]
    return len([place for place in inputs if 0 <= place < extent])


def reached(extent: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """Return the first tap of an axis that meets the map, and the one behind the last.

    All of them where fewer would need other padding at one side than at the other.
    """
    (positions,) = output_size([extent], [taps], [stride], [padding], [dilation])
    first = max(0, -(((positions - 1) * stride - padding) // dilation))  # seen from the last position
    end = min(taps, (extent - 1 + padding) // dilation + 1)  # seen from the first
    margin = padding - first * dilation
    same = output_size([extent], [end - first], [stride], [margin], [dilation]) == (positions,)
    return (first, end) if first < end and margin >= 0 and same else (0, taps)
