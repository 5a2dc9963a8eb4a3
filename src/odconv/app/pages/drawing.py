"""Drawings: as an SVG whose colours are CSS variables, so that it follows a page's light or dark, and as a PNG."""

import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from odconv.app.pages.colours import COLOURS, FAINT, GRID, INK
from odconv.system.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

WIDTH = 4.4  # inches: as wide as a phone, so that letters keep their size there
HEAD = 0.3  # inches, for the title of a PNG
VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--line)"}


class Drawing(NamedTuple):
    """A drawing that can be made: its title, its height in inches without that, and what draws it on a figure.

    `layout` is how matplotlib lays it out; None where `fill` does.
    """

    title: str
    height: float
    fill: Callable[["FigureBase"], None]
    layout: Literal["constrained"] | None

    def svg(self) -> str:
        """Return the drawing as an <svg> element, without its title."""
        from matplotlib.figure import Figure

        with self._style(), io.StringIO() as file:
            figure = Figure((WIDTH, self.height), layout=self.layout, facecolor="none")
            self.fill(figure)
            figure.savefig(file, format="svg", dpi=100, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
            svg = file.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every picture, and needed by none
        svg = re.sub(r'(?<=<svg )(.*?)width="[^"]*" height="[^"]*"', r"\1", svg, count=1, flags=re.DOTALL)
        for colour, variable in VARIABLES.items():
            svg = svg.replace(colour.lower(), variable)
        return svg

    def save(self, path: Path) -> None:
        """Write the drawing under its title as a PNG."""
        from matplotlib.figure import Figure

        with self._style(), replacing(path) as partial:
            figure = Figure((WIDTH, HEAD + self.height), layout=self.layout, facecolor="white")
            parts: Any = figure.subfigures(2, height_ratios=[HEAD, self.height])
            head, body = parts
            head.text(0.05 / WIDTH, 0.4, self.title, size=10, weight="bold", color=INK, va="center")
            self.fill(body)
            figure.savefig(partial, format="png", dpi=200)

    def _style(self) -> AbstractContextManager[None]:
        from matplotlib import rc_context

        # the salt makes ids that are the same each time and no other picture's; text stays text, and never is a formula
        style: Any = {"svg.hashsalt": self.title, "svg.fonttype": "none", "text.parse_math": False, "font.size": 9}
        return rc_context(style)


def on_axes(title: str, height: float, fill: Callable[["Axes"], None]) -> Drawing:
    """Return a drawing on ordinary axes."""

    def fill_axes(figure: "FigureBase") -> None:
        axes = figure.subplots()
        axes.set_facecolor("none")
        fill(axes)

    return Drawing(title, height, fill_axes, "constrained")


def on_paper(title: str, height: float, fill: Callable[["Axes"], None]) -> Drawing:
    """Return a drawing on axes without lines whose units are inches, from the upper left corner."""

    def fill_paper(figure: "FigureBase") -> None:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        axes.set_autoscale_on(False)
        axes.axis("off")
        fill(axes)

    return Drawing(title, height, fill_paper, None)


Box = tuple[float, float, float, float]
"""Left and upper edge, width and height."""


def add_boxes(axes: "Axes", boxes: Iterable[Box], **look: Any) -> None:
    """Add boxes that look the same."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches = [Rectangle((x, y), width, height) for x, y, width, height in boxes]
    axes.add_collection(PatchCollection(patches, **look), autolim=False)


def add_frames(axes: "Axes", boxes: Iterable[Box]) -> None:
    """Add faint frames."""
    add_boxes(axes, boxes, facecolor="none", edgecolor=GRID, linewidth=0.6)


MOST_PARTS = 16
"""Parts of a bar that can be told from each other."""


def add_bars(axes: "Axes", shares: Tensor, x: float, width: float, edges: Sequence[float], height: float) -> np.ndarray:
    """Add shares (rows, n) as bars, the longest as wide as given; return where their parts end, (rows, n)."""
    lengths = (shares * width / shares.sum(1).max()).numpy()
    ends = x + lengths.cumsum(1)
    for index in range(shares.shape[1]):
        parts = zip(ends[:, index] - lengths[:, index], edges, lengths[:, index], strict=True)
        boxes = [(start, y, length, height) for start, y, length in parts]
        add_boxes(axes, boxes, facecolor=COLOURS[index % len(COLOURS)], linewidth=0)
    return ends
