"""The curves of training runs, as a matplotlib figure."""

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import TYPE_CHECKING

from odconv.app.pages.colours import COLOURS, FAINT, GRID, INK, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = {"top1": "top-1 accuracy", "ap": "average precision"}
"""What a run is judged by, by its column of metrics.csv."""


def draw_history(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> "Figure":
    """Draw the loss, the score and the temperature of runs over their epochs, whose rows may lack a column."""
    from matplotlib.figure import Figure

    figure = Figure((13, 4.2), facecolor="white", layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[3, 3, 2])
    scores: dict[str, None] = {}
    for index, (name, rows) in enumerate(runs.items()):
        score = next((column for column in SCORES if any(column in row for row in rows)), "top1")
        scores[SCORES[score]] = None
        columns = ("epoch", "train_loss", "val_loss", score, "temperature")
        epochs, train, val, values, temperatures = ([row.get(column, nan) for row in rows] for column in columns)
        marker = MARKERS[index // len(COLOURS) % len(MARKERS)]
        line = {"color": COLOURS[index % len(COLOURS)], "linewidth": 2, "marker": marker, "markersize": 4}
        best = max((value for value in values if isfinite(value)), default=nan)
        label = name.replace("$", r"\$")  # no formulas
        panels[0].plot(epochs, train, label=label, **line)
        panels[0].plot(epochs, val, **line | {"linestyle": "--", "marker": ""})
        panels[1].plot(epochs, values, label=f"{label}, best {best:.1f} %", **line)
        panels[2].plot(epochs, temperatures, **line)
    measured = f"{' or '.join(scores)} in validation, %"
    titles = ("loss (training; dashed: validation)", measured, "temperature after the epoch")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", size=11, weight="bold", color=INK)
        prepare_epochs(axes)
    panels[0].set_yscale("log")
    panels[2].set_ylim(bottom=0)
    figure.legend(handles=panels[1].lines, loc="outside lower center", ncols=min(3, len(runs)), frameon=False)
    return figure


def prepare_epochs(axes: "Axes") -> None:
    """Plain axes over whole epochs, with a faint grid."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epoch", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT)
