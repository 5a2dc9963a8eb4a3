"""The warehouse of KernelWarehouse: cells that many layers share, and the rules by which they do."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odconv.layers.per_sample import below_each_other
from odconv.layers.starts import placed_like
from odconv.layers.warehouse_attention import Assignment, WarehouseAttention
from odconv.layers.warehouse_conv import KWConv

Ratio = float | Sequence[float]
"""A number for all parameters of a warehouse, or one for each."""


class Pool(NamedTuple):
    """The layers that share one parameter of cells.

    Attributes:
        layers: the layers by name.
        cell: shape of a cell, (co, ci, *window).
        ratio: cells for each piece of the layers' kernels.
    """

    layers: Mapping[str, KWConv]
    cell: tuple[int, ...]
    ratio: float

    @property
    def cells(self) -> int:
        """The number n of cells."""
        return max(int(sum(pieces_of(layer, self.cell) for layer in self.layers.values()) * self.ratio), 1)


class Warehouse(nn.Module):
    """The cells of a network: which of its layers share them, and which of them each piece of a kernel is at first.

    A network has one, as a module of its own, which holds each parameter once, as ``weights.0`` and so on; the layers
    refer to it. The published networks have it as their first module, by the name `warehouse_manager`.

    Args:
        layers: for each parameter, by a name, the layers that share it, by theirs. The order of parameters is their
            numbering. :func:`shared_by_name` groups layers as the published code does.
        order: all layers in the order in which cells are given to them. Published networks have that of
            ``network.modules()``. Default that of `layers`.
        cell_num_ratio: cells for each piece of a kernel: a whole number, or 1/r with a whole r. Default 1. This and the
            next two may be sequences with an entry for each parameter.
        cell_inplane_ratio: channels of a cell as a share of the layers' greatest common divisor. Default 1.
        cell_outplane_ratio: filters of a cell likewise. Default 1.
        spatial_partition: whether each tap of a kernel is a piece of its own. Default True.
        reduction, norm, basis_ratio, init: of the attentions, see
            :class:`~odconv.layers.warehouse_attention.WarehouseAttention`.
        device: where the parameters live.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an option is out of range or does not divide the layers' widths; or a layer is in a warehouse
            already.
        TypeError: layers is no such mapping.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, KWConv]],
        order: Iterable[KWConv] | None = None,
        *,
        cell_num_ratio: Ratio = 1.0,
        cell_inplane_ratio: Ratio = 1.0,
        cell_outplane_ratio: Ratio = 1.0,
        spatial_partition: bool = True,
        reduction: float = 1 / 16,
        norm: str = "batch",
        basis_ratio: float = 1.0,
        init: str = "calm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_layers(layers)
        ratios = per_pool("cell_num_ratio", cell_num_ratio, len(layers))
        inner = per_pool("cell_inplane_ratio", cell_inplane_ratio, len(layers))
        outer = per_pool("cell_outplane_ratio", cell_outplane_ratio, len(layers))
        shapes = [cell_shape(*given, spatial_partition) for given in zip(layers.values(), inner, outer, strict=True)]
        pools = list(map(Pool, layers.values(), shapes, ratios))
        for pool in pools:
            check_ratio(pool)
        empty = (torch.empty(pool.cells, *pool.cell, device=device, dtype=dtype) for pool in pools)
        self.weights = nn.ParameterList(map(nn.Parameter, empty))
        numbers = {layer: number for number, pool in enumerate(pools) for layer in pool.layers.values()}
        ends = [0] * len(pools)
        given = [*(numbers if order is None else order)]
        if {*given} != {*numbers} or len(given) != len(numbers):
            raise ValueError(f"order must hold each of the {len(numbers)} layers once, got {len(given)}")
        self.spreads = [[1.0] * pool.cells for pool in pools]
        for layer in given:
            number = numbers[layer]
            pool = pools[number]
            place, ends[number] = assign(pieces_of(layer, pool.cell), ends[number], pool)
            own = slice(place.start, ends[number])
            std = spread(self.weights[number][own], place if init == "calm" else None)
            self.spreads[number][own] = [std] * (own.stop - own.start)
            attention = WarehouseAttention(
                layer.in_channels,
                place,
                reduction=reduction,
                norm=norm,
                basis_ratio=basis_ratio,
                init=init,
                size=std * math.sqrt(math.prod(pool.cell)),
                device=device,
                dtype=dtype,
            )
            layer.join(self, number, attention)
        self.reset_parameters()
        self.names = {name: [*own] for name, own in layers.items()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the cells again, those of each layer as large as its `init` says."""
        for weight, spreads in zip(self.weights, self.spreads, strict=True):
            if getattr(weight, "_is_hf_initialized", False):  # transformers has loaded it
                continue
            nn.init.normal_(weight)
            stds = torch.tensor(spreads, dtype=weight.dtype, device=weight.device)
            weight.mul_(placed_like(stds.view(-1, *(1,) * (weight.dim() - 1)).expand(weight.shape), weight))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Warehouse":
        super()._apply(below_each_other(fn, [weight.shape for weight in self.weights]), recurse)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return x: among the children of a network that become a sequence, a warehouse lets maps pass."""
        return x

    def extra_repr(self) -> str:
        """Return the layers that share each parameter."""
        return "\n".join(f"({name}): {', '.join(names)}" for name, names in self.names.items())


def shared_by_name(layers: Mapping[str, KWConv], sharing: str | Sequence[str]) -> dict[str, dict[str, KWConv]]:
    """Group layers by their names, once each part between "_" that begins with a word of `sharing` is that word.

    "stage0_layer1_conv0" and "stage0_layer0_conv2" are both "stage0_layer_conv" with ("layer", "conv").

    Args:
        layers: layers by name.
        sharing: the words, or one string with "_" between them.

    Returns:
        What :class:`Warehouse` takes, in the order in which the names come up.
    """
    words = sharing.split("_") if isinstance(sharing, str) else sharing
    groups: dict[str, dict[str, KWConv]] = {}
    for name, layer in layers.items():
        parts = (next((word for word in words if part.startswith(word)), part) for part in name.split("_"))
        groups.setdefault("_".join(parts), {})[name] = layer
    return groups


def check_layers(layers: Mapping[str, Mapping[str, KWConv]]) -> None:
    """Raise an error unless there are layers, each of them once and in no warehouse yet."""
    groups = layers.values() if isinstance(layers, Mapping) else [None]
    if not all(isinstance(own, Mapping) and all(isinstance(one, KWConv) for one in own.values()) for own in groups):
        raise TypeError(
            'layers must map the name of each parameter to KWConv layers by name, as {"0": {"conv": layer}}'
        )
    every = {f"{name} ({pool})": layer for pool, own in layers.items() for name, layer in own.items()}
    if not every:
        raise ValueError("layers must hold at least one layer, got none")
    if len({*every.values()}) < len(every):
        raise ValueError(f"layers must hold each layer once, got {', '.join(every)}")
    if taken := [name for name, layer in every.items() if layer.warehouse is not None]:
        raise ValueError(f"layers must be in no warehouse yet, got {', '.join(taken)}")


def per_pool(name: str, ratio: Ratio, count: int) -> Sequence[float]:
    """Return a ratio for each parameter of a warehouse."""
    ratios = [ratio] * count if isinstance(ratio, int | float) else [*ratio] * (count if len(ratio) == 1 else 1)
    if len(ratios) != count or not all(0 < value < math.inf for value in ratios):
        raise ValueError(f"{name} must be a positive number, or one for each of {count} parameters, got {ratio!r}")
    return ratios


def cell_shape(
    layers: Mapping[str, KWConv], inplane_ratio: float, outplane_ratio: float, spatial_partition: bool
) -> tuple[int, ...]:
    """Return the shape of the cells that layers share, (co, ci, *window).

    Raises:
        ValueError: the layers' kernels cannot be cut into such cells.
    """
    shapes = {name: layer.kernel_shape for name, layer in layers.items()}
    windows = {shape[2:] for shape in shapes.values()}
    if len({len(window) for window in windows}) > 1:
        raise ValueError(f"layers that share cells must have as many dimensions, got {', '.join(layers)}")
    if not spatial_partition and len(windows) > 1:
        raise ValueError(f"spatial_partition must be True for kernels of different sizes, got {sorted(windows)}")
    window = next(iter(windows))
    sizes = []
    for axis, option, ratio in ((0, "cell_outplane_ratio", outplane_ratio), (1, "cell_inplane_ratio", inplane_ratio)):
        common = math.gcd(*(shape[axis] for shape in shapes.values()))
        sizes.append(max(int(common * ratio), 1))
        if common % sizes[-1]:
            kind = "channels" if axis else "filters"
            raise ValueError(
                f"{option} {ratio} makes cells of {sizes[-1]} {kind}, which do not divide the {common} that are common "
                f"to {', '.join(layers)}; ratios of 1, as with whole budgets, always do"
            )
    return (*sizes, *((1,) * len(window) if spatial_partition else window))


def pieces_of(layer: KWConv, cell: tuple[int, ...]) -> int:
    """Return into how many pieces of a cell's shape a layer's kernel is cut."""
    return math.prod(layer.kernel_shape) // math.prod(cell)


def check_ratio(pool: Pool) -> None:
    """Raise a ValueError unless cells can be given to the pieces of all kernels, with none left over."""
    counts = {name: pieces_of(layer, pool.cell) for name, layer in pool.layers.items()}
    if pool.ratio >= 1:
        if pool.ratio != int(pool.ratio):
            raise ValueError(f"cell_num_ratio must be a whole number, or 1 by one, got {pool.ratio}")
        return
    period = int(1 / pool.ratio)
    if 1 / pool.ratio != period:
        raise ValueError(f"cell_num_ratio must be a whole number, or 1 by one, got {pool.ratio}")
    if odd := [f"{name} ({count} pieces)" for name, count in counts.items() if count % period]:
        fitting = [f"1/{r}" for r in range(2, math.gcd(*counts.values()) + 1) if math.gcd(*counts.values()) % r == 0]
        raise ValueError(
            f"cell_num_ratio 1/{period} needs kernels of a multiple of {period} pieces, got {', '.join(odd)}; "
            f"{', '.join([*fitting, 'every whole number'])} would do"
        )


def assign(count: int, start: int, pool: Pool) -> tuple[Assignment, int]:
    """Give cells to the pieces of a layer's kernel, from `start` on; return where they lie, and where the next start.

    With several cells for a piece, it is the first of them; with fewer cells than pieces, those of the pieces that are
    on the diagonal of each square of pieces get one, and the others none.
    """
    cells = pool.cells
    local = int(pool.ratio * count)
    if pool.ratio >= 1:
        step = int(pool.ratio)
        return Assignment(tuple(range(start, start + count * step, step)), start, cells, local), start + count * step
    period, end, pieces = int(1 / pool.ratio), start, []
    for piece in range(count):
        chosen = piece % period == (piece // period) % period
        pieces.append(end if chosen else cells)
        end += chosen
    return Assignment(tuple(pieces), start, cells, local), end


def spread(cells: Tensor, place: Assignment | None) -> float:
    """Return the standard deviation that the cells of a layer are drawn with, Kaiming's (fan-out, ReLU).

    Args:
        cells: the cells, (q, co, ci, *window).
        place: where they lie: those that pieces are assigned to are as large as the cells of one kernel, and the others
            like them. None, as published: all of them are the cells of one kernel.
    """
    count, filters, _, *window = cells.shape
    if place is not None:
        count = sum(cell < place.cells for cell in place.pieces)
    return math.sqrt(2 / (count * filters * math.prod(window)))
