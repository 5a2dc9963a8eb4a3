"""Put the convolutions of a network into a warehouse: freshly drawn, or cut from the kernels that they have."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from odconv.conversion.convert import WAREHOUSE, Chosen, Decision, decide, hand_over, matcher, replace_parts
from odconv.layers.warehouse import Ratio, Warehouse, cell_shape, pieces_of
from odconv.layers.warehouse_attention import set_blend
from odconv.layers.warehouse_conv import KWConv, KWLinear
from odconv.ops.cells import cut
from odconv.system.text import first_few

METHOD = "kernelwarehouse"
NAME = "warehouse_manager"
"""The warehouse's name in a network, as published: its first module."""

MOST = 0.5
"""How many numbers the attentions of layers that share cells may have, for each number of these cells. An attention has
a logit for each cell in each piece of its kernel, which is many where widths have little in common."""


def convert_to_warehouse(
    model: nn.Module,
    *,
    include: Chosen | None = None,
    exclude: Chosen | None = None,
    warm_start: bool = True,
    budget: float = 1.0,
    stages: Sequence[str] | None = None,
    reduction: float = 1 / 16,
    norm: str = "batch",
    init: str = "calm",
) -> nn.Module:
    """Do what :func:`odconv.convert` does for KernelWarehouse; see there for the other arguments.

    Args:
        model: any network.
        include, exclude: which convolutions to replace.
        warm_start: cut the cells from the trained kernels, and set the blend to 1.
        budget: cells for each piece of a kernel; see :func:`ratios`.
        stages: globs of names; the layers that one matches share cells. Default: a stage ends where the map gets
            smaller. In either, layers with groups share none with those without, and a stage is parted where its
            widths have so little in common that attentions would be large.
        reduction: width of the attentions' hidden layer as a share of C.
        norm: its norm, "batch" or "layer".
        init: how the attentions are drawn, "calm" or "published".

    Returns:
        The model.

    Raises:
        ValueError, TypeError: as :func:`odconv.convert`; and the budget does not fit the widths, or is below 1 with a
            warm start, or the model has a warehouse already, or a stage matches nothing.
    """
    _, pools = plan(model, include, exclude, budget, stages, reduction)
    stock(model, pools, warm_start=warm_start, reduction=reduction, norm=norm, init=init, **ratios(budget))
    return model


def plan(
    model: nn.Module,
    include: Chosen | None = None,
    exclude: Chosen | None = None,
    budget: float = 1.0,
    stages: Sequence[str] | None = None,
    reduction: float = 1 / 16,
) -> tuple[list[Decision], dict[str, list[str]]]:
    """Return what becomes of each convolution, and the names of those that share cells, by a name for these.

    Raises:
        ValueError, TypeError: as :func:`convert_to_warehouse`.
    """
    if taken := [name for name, part in model.named_modules() if isinstance(part, (Warehouse, KWConv))]:
        raise ValueError(
            f"the {type(model).__name__} has a warehouse already ({taken[0]}), which a further one would not share; "
            "convert the static network once, with all that `include` is to match"
        )
    decisions = decide(model, METHOD, include, exclude, {})
    chosen = {decision.names[0]: decision.module for decision in decisions if decision.layer is not None}
    if not chosen:
        left = [f"{decision.names[0] or 'it'}: {decision.reason}" for decision in decisions]
        raise ValueError(f"no convolution of the {type(model).__name__} is replaced; {first_few(left, '; ')}")
    if "" in chosen:
        raise ValueError(f"model must hold a warehouse beside its convolutions, got a {type(model).__name__} itself")
    everything = {name: part for name, part in model.named_modules() if is_strided(part) or name in chosen}
    found = stages_by_glob(chosen, stages) if stages is not None else stages_by_resolution(everything, {*chosen})
    pools: dict[str, list[str]] = {}
    for name, stage in found.items():
        conv = chosen[name]
        pools.setdefault(f"stage{stage}{'_grouped' if conv.groups > 1 else ''}_{len(conv.kernel_size)}d", []).append(
            name
        )
    parted = {
        f"{pool}_{part}" if part else pool: names
        for pool, own in pools.items()
        for part, names in enumerate(parts_of(own, chosen, budget, reduction))
    }
    return decisions, parted


def ratios(budget: float) -> dict[str, float]:
    """Return the options of a warehouse that holds `budget` times as many numbers as the static kernels, as published.

    Below 1 the cells are half as wide in both directions, so that there are enough pieces to share them.

    Raises:
        ValueError: budget is neither a whole number nor 1 by one.
    """
    number = isinstance(budget, int | float) and 0 < budget < math.inf
    whole = max(budget, 1 / budget) if number else math.nan
    if not number or abs(whole - round(whole)) > 1e-9:
        raise ValueError(f"budget must be a whole number such as 1, 2 or 4, or 1 by one such as 1/2, got {budget!r}")
    plane = 1.0 if budget >= 1 else 0.5
    exact = float(round(whole)) if budget >= 1 else 1 / round(whole)
    return {"cell_num_ratio": exact, "cell_inplane_ratio": plane, "cell_outplane_ratio": plane}


@torch.no_grad()
def stock(model: nn.Module, pools: Mapping[str, Sequence[str]], *, warm_start: bool = False, **options: Any) -> None:
    """Replace layers of a network by those of KernelWarehouse, with a warehouse as its first module.

    Args:
        model: the network.
        pools: for each parameter of the warehouse, by a name, the names of the convolutions and linear layers that
            share it.
        warm_start: cut the cells from their kernels, and set the blend to 1, at which the network computes what it did.
        **options: of the :class:`~odconv.layers.warehouse.Warehouse`.

    Raises:
        ValueError: as the warehouse; or a start from trained kernels needs a cell for every piece of them.
    """
    given: Ratio = options.get("cell_num_ratio", 1.0)
    least = min([given] if isinstance(given, int | float) else given)
    if warm_start and least < 1:
        raise ValueError(
            f"warm_start must be False with a budget of {least:.4g}: less than one cell for each piece of a "
            "kernel cannot hold the trained kernels"
        )
    old: dict[str, Any] = {name: model.get_submodule(name) for names in pools.values() for name in names}
    weight = next(iter(old.values())).weight
    new, warehouse = layers_of(model, pools, device=weight.device, dtype=weight.dtype, **options)
    for number, names in enumerate(pools.values()):
        warehouse.weights[number].requires_grad_(any(old[name].weight.requires_grad for name in names))
    for name, layer in new.items():
        trained, conv = old[name], layer.conv if isinstance(layer, KWLinear) else layer
        if warm_start:
            start_from(conv, trained)
        conv.train(trained.training)
        if not isinstance(trained, nn.Linear):
            hand_over(trained, conv)
    replace_parts(model, {old[name]: layer for name, layer in new.items()})
    put_first(model, NAME, warehouse)
    if warm_start:
        set_blend(model, 1.0)


def layers_of(
    model: nn.Module, pools: Mapping[str, Sequence[str]], **options: Any
) -> tuple[dict[str, KWConv | KWLinear], Warehouse]:
    """Return the layers that take the place of others, by their names, and the warehouse that they share.

    Args:
        model: the network of the others.
        pools: as for :func:`stock`.
        **options: of the warehouse; `device` and `dtype` are those of the layers, too.
    """
    placed = {name: options[name] for name in ("device", "dtype")}
    new = {name: warehouse_like(model.get_submodule(name), **placed) for names in pools.values() for name in names}
    convs = {name: layer.conv if isinstance(layer, KWLinear) else layer for name, layer in new.items()}
    order = order_of(model, {name: model.get_submodule(name) for name in new})
    shared = {pool: {name: convs[name] for name in names} for pool, names in pools.items()}
    return new, Warehouse(shared, [convs[name] for name in order], **options)


def order_of(model: nn.Module, parts: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of parts of a network in the order of its modules."""
    names = {module: name for name, module in parts.items()}
    return [names[module] for module in model.modules() if module in names]


def warehouse_like(module: Any, **placed: Any) -> KWConv | KWLinear:
    """Return the layer that takes the place of a convolution or a linear layer, without a kernel yet."""
    if isinstance(module, nn.Linear):
        return KWLinear(module.in_features, module.out_features, module.bias is not None, **placed)
    return WAREHOUSE[len(module.kernel_size) - 1](
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.bias is not None,
        module.padding_mode,
        **placed,
    )


def start_from(conv: KWConv, trained: Any) -> None:
    """Let the cells that a layer's pieces are assigned to be the pieces of a trained kernel."""
    assert conv.attention is not None
    cells = conv.cells
    pieces = cut(trained.weight.reshape(conv.kernel_shape), cells.shape[1:])
    cells[list(conv.attention.place.pieces)] = pieces.to(cells.dtype)
    if conv.bias is not None:
        conv.bias.copy_(trained.bias)


def put_first(model: nn.Module, name: str, part: nn.Module) -> None:
    """Make a module the first of a network's."""
    others = dict(model._modules)
    model._modules.clear()
    model.add_module(name, part)
    model._modules.update(others)


def is_strided(module: nn.Module) -> bool:
    """Return whether a module makes the map smaller."""
    stride: Any = getattr(module, "stride", 1)
    steps = stride if isinstance(stride, tuple) else (stride,)
    return any(isinstance(step, int) and step > 1 for step in steps)


def stages_by_resolution(layers: Mapping[str, nn.Module], chosen: set[str]) -> dict[str, int]:
    """Count the stages of layers: a new one begins with what makes the map smaller, once for each block.

    Args:
        layers: the chosen layers and those with a stride, by name, in the order of the network's modules.
        chosen: the names of those whose stages are wanted.

    Returns:
        The stage of each of them, from 0.
    """
    stage, opener = 0, None
    found: dict[str, int] = {}
    for name, layer in layers.items():
        block = name.rpartition(".")[0]
        if is_strided(layer) and found and (opener is None or not f"{name}.".startswith(f"{opener}.")):
            stage += 1
        if is_strided(layer):
            opener = block or None
        if name in chosen:
            found[name] = stage
    return found


def stages_by_glob(layers: Mapping[str, nn.Module], stages: Sequence[str]) -> dict[str, int]:
    """Count the stages of layers by the first glob that matches each.

    Raises:
        ValueError: a glob matches none of the layers, or a layer is matched by none.
    """
    globs = [stages] if isinstance(stages, str) else list(stages)
    matches = [matcher("stages", glob, [*layers]) for glob in globs]
    found = {}
    for name, layer in layers.items():
        number = next((number for number, matched in enumerate(matches) if matched(name, layer)), None)
        if number is None:
            raise ValueError(f"stages: {name} is in none of {globs}; add a glob for it, or exclude it")
        found[name] = number
    return found


def parts_of(names: Sequence[str], layers: Mapping[str, Any], budget: float, reduction: float) -> list[list[str]]:
    """Part the layers of a stage, in their order, so that the attentions of those that share cells stay small."""
    parts: list[dict[str, KWConv]] = [{}]
    for name in names:
        layer: Any = warehouse_like(layers[name], device="meta")
        together = {**parts[-1], name: layer}
        if parts[-1] and attention_share(together, budget, reduction) > MOST:
            parts.append({name: layer})
        else:
            parts[-1] = together
    return [[*part] for part in parts]


def attention_share(layers: Mapping[str, KWConv], budget: float, reduction: float) -> float:
    """Return how many numbers the attentions of layers that share cells have for each number of the cells."""
    options = ratios(budget)
    cell = cell_shape(layers, options["cell_inplane_ratio"], options["cell_outplane_ratio"], spatial_partition=True)
    pieces = {name: pieces_of(layer, cell) for name, layer in layers.items()}
    cells = budget * sum(pieces.values())
    numbers = sum(
        max(layer.in_channels * reduction, 16) * (layer.in_channels + pieces[name] * (cells + 1))
        for name, layer in layers.items()
    )
    return numbers / (cells * math.prod(cell))
