"""Maps of what is dynamic: a row a layer, a column an attention; blank is what never changes."""

from collections.abc import Callable, Sequence
from functools import partial
from math import isnan, log
from typing import TYPE_CHECKING, NamedTuple

from odconv.app.pages.colours import COLOURS, FAINT, INK
from odconv.app.pages.drawing import WIDTH, Box, Drawing, add_boxes, add_frames, on_paper
from odconv.attentions.measurement import WHOLE, Layer
from odconv.attentions.verdicts import KINDS, SAME, VARIES, Row, deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FULL = 0.5
"""Deviation between images, as a share of the mean, of the strongest colour."""

ROW, TOP, BOTTOM = 0.2, 0.42, 0.5  # inches: a layer, what stands above them, what stands below
LETTER = 0.068  # inches: width of a letter of a layer's name
DEVIATION, CLASSES = COLOURS[0], COLOURS[5]


class Map(NamedTuple):
    """What a map shows: a number of each row, how strong its colour is, from 0 to 1, and what the legend says."""

    title: str
    colour: str
    value: Callable[[Row], float]
    strength: Callable[[float], float]
    legend: Sequence[tuple[float, str]]


def draw_deviations(layers: Sequence[Layer]) -> Drawing:
    """Draw how much each attention, and all together, differs between images."""
    legend = ((0.0, "< 1 %: static"), (SAME, "1 %"), (VARIES, "5 %: varies"), (FULL, "50 % and more"))
    return draw_map(layers, Map("How much differs between images, % of the mean", DEVIATION, deviation, depth, legend))


def draw_class_shares(layers: Sequence[Layer]) -> Drawing:
    """Draw how much of that lies between classes."""
    legend = ((0.0, "not of the class"), (0.5, "half"), (1.0, "all of it"))
    title = "How much of that is a matter of the class, %"
    return draw_map(layers, Map(title, CLASSES, class_share, lambda share: share, legend))


def class_share(row: Row) -> float:
    """Return the share of what differs that lies between classes; nan where nothing differs."""
    return row["class_share"] if deviation(row) >= SAME else float("nan")


def depth(share: float) -> float:
    """Return the strength of a deviation, by its logarithm."""
    return min(1.0, 0.12 + 0.88 * log(share / SAME) / log(FULL / SAME)) if share >= SAME else 0.0


def draw_map(layers: Sequence[Layer], shown: Map) -> Drawing:
    """Draw a map of layers."""
    return on_paper(shown.title, TOP + ROW * len(layers) + BOTTOM, partial(fill_map, layers=layers, shown=shown))


def fill_map(axes: "Axes", layers: Sequence[Layer], shown: Map) -> None:
    """Draw the names of layers on the left, the whole kernel beside them, then its attentions."""
    columns = [WHOLE, *(kind for kind in reversed(KINDS) if any(kind in layer.rows for layer in layers))]
    left = 0.15 + LETTER * max(len(layer.name) for layer in layers)
    width = min(0.72, (WIDTH - left - 0.15) / len(columns))
    places = [left + width * index + 0.1 * (index > 0) for index in range(len(columns))]
    for column, x in zip(columns, places, strict=True):
        title = "all\ntogether" if column == WHOLE else column
        weight = "bold" if column == WHOLE else "normal"
        axes.text(x + width / 2, TOP - 0.08, title, ha="center", va="bottom", size=8, weight=weight, color=INK)
    for index, layer in enumerate(layers):
        y = TOP + ROW * index
        axes.text(0.05, y + ROW / 2, layer.name, va="center", size=7.5, color=FAINT if layer.static else INK)
        for column, x in zip(columns, places, strict=True):
            draw_cell(axes, (x, y, width, ROW), layer.rows.get(column), shown)
    draw_legend(axes, TOP + ROW * len(layers) + 0.2, shown)


def draw_cell(axes: "Axes", box: Box, row: Row | None, shown: Map) -> None:
    """Draw a number on its colour; a dash where there is no such attention, a point where there is nothing to say."""
    x, y, width, height = box
    value = shown.value(row) if row else float("nan")
    strength = 0.0 if isnan(value) else shown.strength(value)
    draw_box(axes, (x + 0.015, y + 0.015, width - 0.03, height - 0.03), shown.colour, strength)
    text = "-" if row is None else "·" if isnan(value) else f"{100 * value:.{0 if value >= 0.0995 else 1}f}"
    colour = "#ffffff" if strength > 0.9 else INK if strength else FAINT
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center_baseline", size=7.5, color=colour)


def draw_box(axes: "Axes", box: Box, colour: str, strength: float) -> None:
    """Draw a box as strong as it shall be, with a faint frame where that is not at all."""
    if strength:
        add_boxes(axes, [box], facecolor=colour, alpha=strength, linewidth=0)
    else:
        add_frames(axes, [box])


def draw_legend(axes: "Axes", y: float, shown: Map) -> None:
    """Draw what colours mean, side by side."""
    x = 0.05
    for value, text in shown.legend:
        draw_box(axes, (x, y, 0.16, 0.13), shown.colour, shown.strength(value))
        axes.text(x + 0.21, y + 0.065, text, va="center_baseline", size=7.5, color=FAINT)
        x += 0.36 + 0.062 * len(text)
