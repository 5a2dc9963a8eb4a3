"""What a conversion does to a network, before it is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from odconv.conversion.convert import WAREHOUSE_OPTIONS, Chosen, Decision, check_known, decide, dynamic_like
from odconv.conversion.warehouse import METHOD, NAME, layers_of, plan, ratios
from odconv.layers import DynamicConv
from odconv.layers.warehouse import Warehouse
from odconv.profiling.count import count_madds, count_parameters, profile, record_calls, zeros_for
from odconv.profiling.table import Table, short


class Replacement(NamedTuple):
    """What becomes of a convolution.

    Attributes:
        name: its name in the network; its first one where it is used in several places.
        kind: its class.
        becomes: class of the layer that replaces it; empty where it is left.
        reason: why it is left; empty where it is replaced.
        parameters: number of its parameters, before and after.
    """

    name: str
    kind: str
    becomes: str
    reason: str
    parameters: tuple[int, int]


@dataclass(frozen=True)
class Conversion:
    """What :func:`odconv.convert` does to a network; prints as a table.

    Attributes:
        rows: the convolutions and dynamic layers, in the order of the network's modules.
        parameters: number of parameters of the network, before and after.
        madds: its multiply-adds, before and after; None where no input size was given.
    """

    rows: list[Replacement]
    parameters: tuple[int, int]
    madds: tuple[int, int] | None

    @property
    def table(self) -> Table:
        """What becomes of each convolution, and the totals."""
        lines = [
            (
                row.name or "(itself)",
                row.kind,
                row.becomes or f"left: {row.reason}",
                *map("{:,}".format, row.parameters),
            )
            for row in self.rows
        ]
        replaced = sum(bool(row.becomes) for row in self.rows)
        counts = f"{replaced} replaced, {len(self.rows) - replaced} left"
        lines.append(("all parameters", "", counts, *map("{:,}".format, self.parameters)))
        if self.madds is not None:
            lines.append(("multiply-adds", "", "", *map(short, self.madds)))
        return Table(("layer", "kind", "becomes", "before", "after"), lines, left=3)

    def __str__(self) -> str:
        """Return the table as plain text."""
        return str(self.table)

    def __rich__(self) -> Table:
        """Return the table, for rich."""
        return self.table


def conversion_report(
    model: nn.Module,
    to: str | type[DynamicConv] = "odconv",
    *,
    include: Chosen | None = None,
    exclude: Chosen | None = None,
    input_size: Sequence[int] | None = None,
    **layer_options: Any,
) -> Conversion:
    """Report what :func:`odconv.convert` would replace, what not and why, and what that costs.

    The model is left as it is.

    Args:
        model, to, include, exclude, layer_options: as for :func:`odconv.convert`.
        input_size: shape of the network's input, (B, C, *map) or (C, *map), to count multiply-adds as
            :func:`odconv.profile` does, for one sample. Default: they are not counted.

    Returns:
        The report; ``print`` shows a table.

    Raises:
        ValueError, TypeError: as :func:`odconv.convert` and :func:`odconv.profile`.
    """
    decisions, new, warehouse = plan_layers(model, to, include, exclude, layer_options)
    rows = [
        Replacement(
            decision.names[0],
            type(decision.module).__name__,
            "" if layer is None else type(layer).__name__,
            decision.reason,
            (count_parameters(decision.module), count_parameters(layer or decision.module)),
        )
        for decision, layer in zip(decisions, new, strict=True)
    ]
    if warehouse is not None:
        rows.insert(0, Replacement(NAME, "", type(warehouse).__name__, "", (0, count_parameters(warehouse))))
    before = count_parameters(model)
    after = before + sum(row.parameters[1] - row.parameters[0] for row in rows)
    if input_size is None:
        return Conversion(rows, (before, after), None)
    x = zeros_for(model, input_size)
    calls = record_calls(model, x)
    more = sum(
        count_madds(layer, call) - count_madds(decision.module, call)
        for decision, layer in zip(decisions, new, strict=True)
        for call in calls.get(decision.module, [])
        if layer is not None
    )
    madds = profile(model, input_size).madds
    return Conversion(rows, (before, after), (madds, madds + more // x.shape[0]))


def plan_layers(
    model: nn.Module,
    to: str | type[DynamicConv],
    include: Chosen | None,
    exclude: Chosen | None,
    layer_options: dict[str, Any],
) -> tuple[list[Decision], list[Any], Warehouse | None]:
    """Return what becomes of each convolution, the layers on the meta device, None for what is left, and a warehouse.

    Raises:
        ValueError, TypeError: as :func:`odconv.convert`.
    """
    if to != METHOD:
        decisions = decide(model, to, include, exclude, layer_options)
        return (
            decisions,
            [
                None if decision.layer is None else dynamic_like(decision.module, decision.layer, layer_options, "meta")
                for decision in decisions
            ],
            None,
        )
    check_known(layer_options, WAREHOUSE_OPTIONS, METHOD)
    norm = {name: layer_options[name] for name in layer_options.keys() & {"norm", "reduction"}}
    planning = {name: value for name, value in layer_options.items() if name != "norm"}
    decisions, pools = plan(model, include, exclude, **planning)
    options = ratios(layer_options.get("budget", 1.0)) | norm
    made, warehouse = layers_of(model, pools, device="meta", dtype=None, **options)
    return decisions, [made.get(decision.names[0]) for decision in decisions], warehouse
