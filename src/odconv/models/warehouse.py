"""KernelWarehouse's networks: which convolutions of the zoo's share cells, and the settings of each budget."""

from typing import Any

from torch import nn

from odconv.conversion.warehouse import ratios, stock
from odconv.models.zoo import Backbone

OPTIONS = ("budget", "reduction", "init")
SETTINGS = (1, 2, 3, 4, 3, 3, 1)
"""Blocks of a MobileNetV2, setting by setting. The first block of one from the third on belongs to the stage before,
and the last setting to that of the one before it."""

BASIS = 1 / 16
"""ResNets of Bottlenecks at 1/2x mix their logits of other layers' cells of few."""


def make_warehouse(
    model: Any,
    backbone: Backbone,
    *,
    budget: float = 1.0,
    reduction: float | None = None,
    warm_start: bool = False,
    init: str = "calm",
) -> None:
    """Put the convolutions of a static network of the zoo into a warehouse, in place, as published.

    Args:
        model: the network.
        backbone: its row of the zoo.
        budget, reduction: as for :func:`plan`.
        warm_start: cut the cells from the network's kernels; for budgets of 1 and more.
        init: how the attentions are drawn, "calm" or "published".

    Raises:
        ValueError: the budget is out of range or does not fit the widths.
    """
    pools, options = plan(model, backbone, budget, reduction)
    if backbone.builder == "mobilenet_v2" and budget >= 1:
        dropout, linear = model.classifier
        if dropout.p > 0:
            raise ValueError(
                f"dropout must be 0 for MobileNetV2 of budget {budget}, published without, got {dropout.p}"
            )
        model.classifier = linear  # without dropout's place in the name
    stock(model, pools, warm_start=warm_start, init=init, **options)


def plan(
    model: Any, backbone: Backbone, budget: float = 1.0, reduction: float | None = None
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return which convolutions of a static network of the zoo share cells, and the options of the warehouse.

    Args:
        model: the network.
        backbone: its row of the zoo.
        budget: numbers in the warehouse for each of the static kernels: 1/4, 1/2, 1, 2 or 4, for example.
        reduction: width of the attentions' hidden layer as a share of C. Default 1/16, and 1/32 for MobileNetV2 at
            budgets below 1.

    Returns:
        What :func:`~odconv.conversion.warehouse.stock` takes.

    Raises:
        ValueError: the budget is out of range.
    """
    options: dict[str, Any] = dict(ratios(budget))
    if backbone.builder == "convnext":
        pools = convnext_pools(model)
        options["norm"] = "layer"
    elif backbone.builder != "mobilenet_v2":
        pools = resnet_pools(model)
        if budget < 1 and hasattr(model.layer1[0], "conv3"):
            options["basis_ratio"] = BASIS
    elif budget < 1:
        pools = small_mobilenet_pools(model)
        options |= small_mobilenet_ratios(budget, pools)
        reduction = 1 / 32 if reduction is None else reduction
    else:
        pools = mobilenet_pools(model, together=budget == 1)
    if reduction is not None:
        options["reduction"] = reduction
    return pools, options


def resnet_pools(model: Any) -> dict[str, list[str]]:
    """Return the convolutions of a ResNet that share cells: a stage's, and what hands over to the next one.

    The first convolution of a stage and its shortcut have inputs as wide as the stage before, and belong to it. Those
    of the first stage of Bottlenecks, which has none before it, stay as they are.
    """
    pools: dict[str, list[str]] = {f"stage{stage}": [] for stage in range(4)}
    for stage in range(4):
        for number, block in enumerate(getattr(model, f"layer{stage + 1}")):
            path = f"layer{stage + 1}.{number}"
            parts = [f"conv{part}" for part in (1, 2, 3) if hasattr(block, f"conv{part}")]
            parts += ["downsample.0"] if block.downsample is not None else []
            for part in parts:
                handed = number == 0 and part in ("conv1", "downsample.0")
                if not (handed and stage == 0 and len(parts) > 2):
                    pools[f"stage{max(stage - handed, 0)}"].append(f"{path}.{part}")
    return pools


def mobilenet_pools(model: Any, together: bool) -> dict[str, list[str]]:
    """Return the convolutions of a MobileNetV2 that share cells: those of a kind in a stage.

    Args:
        model: the network.
        together: whether expanding and projecting convolutions share cells.
    """
    pools = {"stem": ["features.0.0"]}
    for path, stage, kind in mobilenet_layers(model):
        shared = "pointwise" if together and kind != "depthwise" else kind
        pools.setdefault(f"stage{stage}_{shared}", []).append(path)
    return pools


def convnext_pools(model: Any) -> dict[str, list[str]]:
    """Return the convolutions of a ConvNeXt that share cells: the 1x1 ones of a stage, and its depth-wise ones."""
    pools = {
        f"narrowing{stage}": [f"downsample_layers.{stage}.{place}"]
        for stage, narrow in enumerate(model.downsample_layers)
        for place, part in enumerate(narrow)
        if isinstance(part, nn.Conv2d)
    }
    for stage, blocks in enumerate(model.stages):
        paths = [f"stages.{stage}.{number}" for number in range(len(blocks))]
        pools[f"stage{stage}_depthwise"] = [f"{path}.dwconv" for path in paths]
        pools[f"stage{stage}_pointwise"] = [f"{path}.{part}" for path in paths for part in ("pwconv1", "pwconv2")]
    return pools


def small_mobilenet_pools(model: Any) -> dict[str, list[str]]:
    """Return those of a MobileNetV2 with less than one cell for each piece.

    Pointwise convolutions share cells in the last stage alone; the classifier has some too.
    """
    pools = mobilenet_pools(model, together=False)
    last = f"stage{max(stage for _, stage, _ in mobilenet_layers(model))}"
    kept = {pool: names for pool, names in pools.items() if pool == "stem" or "depthwise" in pool or last in pool}
    return kept | {"classifier": ["classifier.1"]}


def small_mobilenet_ratios(budget: float, pools: dict[str, list[str]]) -> dict[str, list[float]]:
    """Return the ratios of these: one cell for each piece but in the last stage and the classifier."""
    number, inner, outer = [], [], []
    for pool in pools:
        small = pool.endswith(("expand", "project")) or pool == "classifier"
        number.append(budget if small else 1.0)
        inner.append(1 / 40 if pool == "classifier" else 0.5 if small else 1.0)
        outer.append(0.5 if small and pool != "classifier" else 1.0)
    return {"cell_num_ratio": number, "cell_inplane_ratio": inner, "cell_outplane_ratio": outer}


def mobilenet_layers(model: Any) -> list[tuple[str, int, str]]:
    """Return the convolutions of a MobileNetV2's blocks and its last one: path, stage and kind."""
    found, index = [], 1
    for setting, blocks in enumerate(SETTINGS):
        for block in range(blocks):
            stage = max(setting - (block == 0), 0)
            kinds = ("depthwise", "project") if index == 1 else ("expand", "depthwise", "project")
            convs = [name for name, part in model.features[index].conv.named_modules() if isinstance(part, nn.Conv2d)]
            found += [(f"features.{index}.conv.{name}", stage, kind) for name, kind in zip(convs, kinds, strict=True)]
            index += 1
    return [*found, (f"features.{index}.0", stage, "project")]
