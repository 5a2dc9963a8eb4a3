"""The n kernels of layers: how alike they are, and which of them the classes use."""

from collections.abc import Callable, Sequence
from functools import partial
from math import isnan
from typing import TYPE_CHECKING

import numpy as np
import torch

from odconv.app.pages.colours import FAINT, INK
from odconv.app.pages.drawing import MOST_PARTS, WIDTH, Drawing, add_bars, add_frames, on_paper
from odconv.app.pages.visualize.by_layer import diverging, shorten
from odconv.app.pages.visualize.overview import class_share
from odconv.attentions.kernels import usage
from odconv.attentions.measurement import Layer
from odconv.attentions.statistics import mixture_entropy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LETTER = 0.0515  # inches: width of a letter of a layer's name here
SIDE = 0.58  # inches: of a matrix
BAR = 0.13  # inches: height of a bar and what is between two
MOST_LAYERS, MOST_CLASSES = 12, 32
"""Layers of which the kernels are drawn class by class, and classes of which they are."""


def draw_similarity(layers: Sequence[Layer]) -> Drawing | None:
    """Draw the cosines of each layer's kernels as a small matrix; None where no layer has several.

    Layers that share cells have one, under the name of the first.
    """
    first = {id(layer.similarity): layer for layer in reversed(layers)}
    mixed = [layer for layer in layers if len(layer.similarity) > 1 and first[id(layer.similarity)] is layer]
    if not mixed:
        return None
    across = per_line(mixed, SIDE)
    lines = -(-len(mixed) // across)
    return on_paper(
        f"How alike the {mixed[0].part}s of a layer are",
        (SIDE + 0.42) * lines + 0.3,
        partial(fill_similarity, layers=mixed),
    )


def per_line(layers: Sequence[Layer], least: float) -> int:
    """Return how many small pictures under the names of layers go side by side."""
    return int((WIDTH - 0.05) // max(least + 0.15, 0.05 + LETTER * max(len(layer.name) for layer in layers)))


def fill_similarity(axes: "Axes", layers: Sequence[Layer]) -> None:
    """Draw the matrices, and below what their colours mean."""
    from matplotlib.colors import Normalize

    across = per_line(layers, SIDE)
    for index, layer in enumerate(layers):
        line, column = divmod(index, across)
        x, y = 0.05 + column * (WIDTH - 0.05) / across, line * (SIDE + 0.42)
        n = len(layer.similarity)
        between = layer.similarity[~torch.eye(n, dtype=torch.bool)].mean().item()
        axes.text(x, y + 0.12, layer.name, size=6.5, va="center", color=INK)
        axes.text(x, y + 0.25, f"mean {between:.2f}", size=6.5, va="center", color=FAINT)
        box = (x, x + SIDE, y + 0.34 + SIDE, y + 0.34)
        axes.imshow(layer.similarity.numpy(), extent=box, aspect="auto", cmap=diverging(), norm=Normalize(-1, 1))
        add_frames(axes, [(x, y + 0.34, SIDE, SIDE)])
    y = -(-len(layers) // across) * (SIDE + 0.42) + 0.15
    axes.imshow(np.linspace(-1, 1, 65)[None], extent=(0.8, 2.2, y + 0.05, y - 0.05), aspect="auto", cmap=diverging())
    axes.text(0.75, y, "opposite", ha="right", va="center_baseline", size=7, color=FAINT)
    axes.text(2.25, y, "equal (cosine 1); blank is unrelated (0)", va="center_baseline", size=7, color=FAINT)


def draw_shares(layers: Sequence[Layer], classes: Sequence[str]) -> Drawing | None:
    """Draw the mean shares of the kernels class by class, for the layers in which the class matters most.

    None where no layer mixes several kernels, but not too many, in shares that differ, or there are too many classes.
    """
    mixed = [layer for layer in layers if 1 < len(layer.similarity) <= MOST_PARTS]
    shares = {layer.name: class_share(layer.rows["kernel"]) for layer in mixed}
    most = sorted((name for name, share in shares.items() if not isnan(share)), key=lambda name: -shares[name])
    chosen = [layer for layer in layers if layer.name in most[:MOST_LAYERS]]
    names = list(dict.fromkeys(classes))
    if not chosen or len(names) > MOST_CLASSES:
        return None
    height = 0.36 + BAR * len(names) + 0.1
    lines = -(-len(chosen) // 3)
    fill: Callable[[Axes], None] = partial(fill_shares, layers=chosen, classes=classes, names=names)
    return on_paper("Shares of the kernels, class by class", height * lines, fill)


def fill_shares(axes: "Axes", layers: Sequence[Layer], classes: Sequence[str], names: Sequence[str]) -> None:
    """Draw the bars, with the entropy of each class beside them."""
    left = 0.1 + 0.063 * max(len(shorten(name)) for name in names)
    width, height = (WIDTH - left) / 3, 0.36 + BAR * len(names) + 0.1
    members = [[index for index, name in enumerate(classes) if name == wanted] for wanted in names]
    for index, layer in enumerate(layers):
        line, column = divmod(index, 3)
        x, y = left + column * width, line * height
        share = layer.rows["kernel"]["class_share"]
        axes.text(x, y + 0.12, layer.name, size=6.5, va="center", color=INK)
        axes.text(x, y + 0.25, f"{100 * share:.0f} % by class", size=6.5, va="center", color=FAINT)
        values = layer.attentions["kernel"].float()
        means = torch.stack([usage(values[of_class]).mean(0) for of_class in members])
        middles = [y + 0.36 + BAR * (row + 0.5) for row in range(len(names))]
        add_bars(axes, means, x, width - 0.4, [middle - 0.4 * BAR for middle in middles], 0.8 * BAR)
        for middle, name, of_class in zip(middles, names, members, strict=True):
            entropy = mixture_entropy(values[of_class]).item()
            axes.text(x + width - 0.37, middle, f"{entropy:.2f}", va="center_baseline", size=6, color=FAINT)
            if not column:
                axes.text(left - 0.06, middle, shorten(name), ha="right", va="center_baseline", size=7, color=INK)
