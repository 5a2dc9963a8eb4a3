"""The attentions of one layer: one row per image, in which blank is what does not depend on the image."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from odconv.app.pages.attention_figure import colour_scale
from odconv.app.pages.colours import FAINT, GATES, INK, LEAST_RANGE, LESS, MORE
from odconv.app.pages.drawing import MOST_PARTS, WIDTH, Drawing, add_bars, add_frames, on_paper
from odconv.attentions.kernels import usage
from odconv.attentions.measurement import Layer
from odconv.attentions.verdicts import deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

UNIT = 0.018  # inches, of which the following are multiples
ROW, BOX, GAP = 14 * UNIT, 12 * UNIT, 3 * UNIT  # from row to row, height of what a row shows, between two classes
TOP, BOTTOM = 0.75, 0.4  # inches: what stands above and below
MOST_COLUMNS = 180
"""Columns of a strip, which are finer than can be seen; of more, neighbours are averaged."""
MOST_LETTERS = 12


class Rows(NamedTuple):
    """The images to show: which of those that were measured, their pixels (H, W, 3), and a word for each."""

    indices: list[int]
    pixels: list[np.ndarray]
    words: list[str]


def draw_layer(layer: Layer, rows: Rows, scale: float) -> Drawing:
    """Draw the attentions of a layer for some images, in full colour where they deviate by `scale` of their mean."""
    return on_paper(layer.name, places(rows)[-1] + ROW + BOTTOM, partial(fill, layer=layer, rows=rows, scale=scale))


def colour_range(layers: Sequence[Layer]) -> float:
    """Return a scale for all of some layers: what but 1 % of the deviations stay below, from 0.1 to 1."""
    largest = [
        float(np.quantile(relative(values).abs().numpy(), 0.99))
        for layer in layers
        for kind, values in drawn_values(layer).items()
        if not is_bar(kind, values)
    ]
    return min(1.0, max([LEAST_RANGE, *largest]))


def drawn_values(layer: Layer) -> dict[str, Tensor]:
    """Return what is drawn of a layer's attentions, (B, ...): of the pieces of kernels what they take of each cell."""
    return {kind: usage(values) if kind == "kernel" else values for kind, values in layer.attentions.items()}


def is_bar(kind: str, values: Tensor) -> bool:
    """Return whether an attention is drawn as a bar of shares, which can be told from each other."""
    return kind == "kernel" and values.shape[1] <= MOST_PARTS


def relative(values: Tensor) -> Tensor:
    """Deviations from the mean over the images, (B, ...), as shares of the mean over all."""
    return (values - values.mean(0)) / values.mean().clamp(min=1e-12)


def places(rows: Rows) -> list[float]:
    """Return the upper edges of the rows, in inches: that of the mean, then those of the images."""
    y = TOP + ROW + 2 * GAP
    edges = [TOP, y]
    for before, word in zip(rows.words, rows.words[1:], strict=False):
        y += ROW + GAP * (before != word and len({*rows.words}) < len(rows.words))
        edges.append(y)
    return edges


def fill(axes: "Axes", layer: Layer, rows: Rows, scale: float) -> None:
    """Draw the images and their words on the left, then a panel for each attention."""
    edges = places(rows)
    words = ["mean", *(shorten(word) for word in rows.words)]
    axes.text(0.05, edges[0] + BOX / 2, words[0], va="center", size=7.5, color=INK)
    show(axes, [thumbnail(pixels) for pixels in rows.pixels], (0.05, BOX), edges[1:])
    for y, word in zip(edges[1:], words[1:], strict=True):
        axes.text(0.12 + BOX, y + BOX / 2, word, va="center", size=7, color=INK)
    axes.text(0.05, 0.14, layer.shape, va="center", size=8, color=FAINT)
    x = 0.22 + BOX + 0.058 * max(map(len, words))
    drawn = drawn_values(layer)
    kinds = list(reversed(drawn))
    fixed = {"spatial": 0.46} | {kind: 0.95 for kind, values in drawn.items() if is_bar(kind, values)}
    strips = [kind for kind in kinds if kind not in fixed]
    room = WIDTH - 0.05 - x - sum(fixed[kind] + 0.12 for kind in kinds if kind in fixed) - 0.12 * (len(strips) - 1)
    for kind in kinds:
        width = fixed.get(kind) or room / len(strips)
        values, shape = drawn[kind], "x".join(map(str, layer.attentions[kind].shape[1:]))
        axes.text(x, TOP - 0.3, kind, size=8, weight="bold", color=INK)
        axes.text(x, TOP - 0.17, shape, size=7, color=FAINT)
        axes.text(x, TOP - 0.05, f"±{100 * deviation(layer.rows[kind]):.1f} %", size=7, color=INK)
        shown = torch.cat([values.mean(0, keepdim=True), values[rows.indices]]).float()
        if is_bar(kind, values):
            ends = add_bars(axes, shown, x, width, [y + 0.02 for y in edges], BOX - 0.04)
            axes.vlines(ends[0, :-1], edges[1] - 0.03, edges[-1] + BOX + 0.03, color=INK, linewidth=0.6)
        else:
            draw_gates(axes, values.float(), rows.indices, (x, width), edges, scale)
        x += width + 0.12
    draw_key(axes, edges[-1] + ROW + 0.18, scale)


def draw_gates(
    axes: "Axes", values: Tensor, indices: list[int], span: tuple[float, float], edges: Sequence[float], scale: float
) -> None:
    """Draw the mean of gates (B, ...) in a row by itself, and what differs: a grid of taps, or a strip of the rest.

    Channels and filters stand in the order of their means; slices of a 3-d kernel side by side.
    """
    from matplotlib.colors import Normalize

    x, width = span
    grid = values.dim() > 2
    mean, differs = values.mean(0), relative(values)[indices]
    if not grid:
        order = mean.argsort()
        mean, differs = mean[order], differs[:, order]
    tables = [tabulate(table) for table in (mean, *differs)]
    span = (x, min(width, BOX * tables[0].shape[1] / tables[0].shape[0]) if grid else width)
    show(axes, tables[:1], span, edges[:1], cmap=GATES, norm=colour_scale(mean))
    show(axes, tables[1:], span, edges[1:], cmap=diverging(), norm=Normalize(-scale, scale))
    add_frames(axes, [(x, y, span[1], BOX) for y in edges])


def show(
    axes: "Axes", tables: Sequence[np.ndarray], span: tuple[float, float], edges: Sequence[float], **look: Any
) -> None:
    """Show tables of numbers or colours (rows, columns, ...) below each other, as one image with gaps."""
    fine = max(12, len(tables[0]) // 12 * 12)  # lines of a box
    start = [round((y - edges[0]) / UNIT) * fine // 12 for y in edges]
    image = np.full((start[-1] + fine, *tables[0].shape[1:]), np.nan)
    for line, table in zip(start, tables, strict=True):
        image[line : line + fine] = table[np.arange(fine) * len(table) // fine]
    extent = (span[0], sum(span), edges[-1] + BOX, edges[0])
    axes.imshow(image, extent=extent, aspect="auto", interpolation="nearest", **look)


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) of bytes as 24 x 24 opaque colours from 0 to 1, of 16 shades for smaller files."""
    small = F.adaptive_avg_pool2d(torch.from_numpy(pixels).movedim(-1, 0) / 255, 24).movedim(0, -1)
    return torch.cat([(15 * small).round() / 15, torch.ones(24, 24, 1)], dim=-1).numpy()


def tabulate(values: Tensor) -> np.ndarray:
    """Return a vector as a row, taps as rows and columns, the slices of a 3-d kernel side by side."""
    if values.dim() < 3:
        columns = min(MOST_COLUMNS, values.shape[-1])
        return F.adaptive_avg_pool1d(values.reshape(-1, 1, values.shape[-1]), columns)[:, 0].numpy()
    return np.concatenate([piece.numpy() for piece in values], axis=1)


def diverging() -> "Colormap":
    """Colours from less over nothing to more; their root, for little to be seen."""
    from matplotlib.colors import ListedColormap, to_rgba

    steps = np.linspace(-1, 1, 129)
    return ListedColormap([to_rgba(LESS if step < 0 else MORE, abs(step) ** 0.5) for step in steps])


def draw_key(axes: "Axes", y: float, scale: float) -> None:
    """Draw what the colours mean."""
    axes.text(0.05, y, "less", va="center_baseline", size=7, color=FAINT)
    axes.imshow(np.linspace(-1, 1, 65)[None], extent=(0.35, 1.55, y + 0.05, y - 0.05), aspect="auto", cmap=diverging())
    text = f"more than the mean of all images; full at {100 * scale:.0f} %"
    axes.text(1.62, y, text, va="center_baseline", size=7, color=FAINT)


def shorten(word: str) -> str:
    """Return a word of not too many letters."""
    return word if len(word) <= MOST_LETTERS else f"{word[: MOST_LETTERS - 1]}…"
