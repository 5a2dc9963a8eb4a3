"""The pictures of a report."""

from collections.abc import Iterator, Sequence
from functools import partial
from math import isfinite, nan
from typing import TYPE_CHECKING, NamedTuple

from odconv.app.pages.colours import COLOURS, FAINT, GATES, INK, LEAST_RANGE
from odconv.app.pages.curves import prepare_epochs
from odconv.app.pages.drawing import Drawing, on_axes
from odconv.app.pages.reports.read_run import Row, Run
from odconv.attentions.verdicts import KINDS, deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize

MOST_LABELS = 30


class Curve(NamedTuple):
    """What a picture of columns of metrics.csv shows: the columns, and what the legend calls each."""

    title: str
    columns: dict[str, str]
    factor: float = 1
    from_zero: bool = True


CURVES = (
    Curve("Loss", {"train_loss": "training", "val_loss": "validation"}, from_zero=False),
    Curve("Accuracy in validation, %", {"top1": "top-1", "top5": "top-5"}, from_zero=False),
    Curve("Average precision in validation, %", {"ap": "boxes", "mask_ap": "masks"}),
    Curve("Learning rate", {"lr": ""}),
    Curve("Temperature after the epoch", {"temperature": ""}),
    Curve("Blend after the epoch", {"blend": ""}),
    Curve("Images a second in training", {"images_per_second": ""}),
    Curve("Share of the training time spent waiting for images, %", {"data_wait": ""}, factor=100),
)


def draw_curves(run: Run) -> Iterator[Drawing]:
    """Draw the columns that the run has over its epochs, the temperature only where there are dynamic layers."""
    for curve in CURVES:
        columns = {column: label for column, label in curve.columns.items() if run.values(column)}
        if columns and (run.dynamic or "temperature" not in columns):
            yield on_axes(curve.title, 2.4, partial(draw_lines, run=run, curve=curve._replace(columns=columns)))


def draw_lines(axes: "Axes", run: Run, curve: Curve) -> None:
    """Draw a line for each column."""
    for index, (column, label) in enumerate(curve.columns.items()):
        values = [curve.factor * row.get(column, nan) for row in run.epochs]
        marker = "o" if len(values) <= 30 else ""
        axes.plot(
            [row["epoch"] for row in run.epochs], values, color=COLOURS[index], marker=marker, markersize=4, label=label
        )
    prepare_epochs(axes)
    if curve.from_zero:
        axes.set_ylim(0, 1.1 * curve.factor * max(max(run.values(column)) for column in curve.columns) or 1)
    if len(curve.columns) > 1:
        axes.legend(frameon=False, labelcolor=INK)


def draw_attentions(rows: Sequence[Row]) -> Iterator[Drawing]:
    """Draw the deviation between images of each attention, layer by layer over the epochs, all in the same colours."""
    from matplotlib.colors import PowerNorm

    shares = [share for row in rows if isfinite(share := deviation(row))]
    scale = PowerNorm(0.5, 0, 100 * max([LEAST_RANGE, *shares]))  # the root, for small deviations to be seen
    for kind in KINDS:
        if of_kind := [row for row in rows if row["attention"] == kind]:
            cells = {(row["layer"], row["epoch"]): 100 * deviation(row) for row in of_kind}
            yield draw_map(f"{kind.capitalize()} attention: deviation between images, % of the mean", cells, scale)


def draw_kernels(rows: Sequence[Row]) -> Iterator[Drawing]:
    """Draw how much the kernels of each layer differ over the epochs, and how evenly they are mixed."""
    from matplotlib.colors import Normalize

    titles = {
        "kernel_distance": "Distance of the kernels: 0 equal, 1 unrelated",
        "entropy": "Entropy of the mixture: 0 one kernel, 1 equal shares",
    }
    for column, title in titles.items():
        if cells := {(row["layer"], row["epoch"]): row[column] for row in rows if isfinite(row[column])}:
            yield draw_map(title, cells, Normalize(0, 1))


def draw_map(title: str, cells: dict[tuple[str, float], float], scale: "Normalize") -> Drawing:
    """Return a map of colours with a row a layer and a column an epoch."""
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    height = 1.0 + 0.17 * min(MOST_LABELS, len(layers))
    return on_axes(title, height, partial(draw_cells, layers=layers, cells=cells, scale=scale))


def draw_cells(axes: "Axes", layers: Sequence[str], cells: dict[tuple[str, float], float], scale: "Normalize") -> None:
    """Draw the cells, names of as many layers on the left as can be read, and the scale on the right."""
    from matplotlib.ticker import MaxNLocator

    epochs = sorted({epoch for _, epoch in cells})
    values = [[cells.get((layer, epoch), nan) for epoch in epochs] for layer in layers]
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(layers) - 0.5, -0.5)
    image = axes.imshow(values, GATES, scale, aspect="auto", interpolation="none", extent=extent)
    every = -(-len(layers) // MOST_LABELS)
    axes.set_yticks(range(0, len(layers), every), layers[::every], size=7.5)
    axes.set_xlabel("epoch", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=FAINT, length=0)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06, aspect=4 + 1.2 * min(MOST_LABELS, len(layers)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=FAINT, length=0)
