"""What a network does with some images: its answers, its attentions, and what they come to, layer by layer."""

from collections.abc import Iterable
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odconv.attentions.class_scatter import Scatter, scatter
from odconv.attentions.kernels import kernel_similarity, scatter_of_kernels
from odconv.attentions.recording import recording
from odconv.attentions.statistics import COLUMNS, describe_attentions
from odconv.attentions.verdicts import KINDS, VERDICTS, Row, verdict
from odconv.layers import Attentions
from odconv.system.text import count

WHOLE = "mixed kernel"
"""What the rows of a layer's kernel, all of its attentions taken together, have as their attention."""

CLASS_COLUMNS = ("between_classes", "within_classes", "class_share")


class Layer(NamedTuple):
    """A dynamic layer on some images.

    Attributes:
        name: where it is.
        shape: its sizes, in words.
        attentions: its attentions, by their kinds in the order of KINDS, each (B, ...).
        rows: their statistics, by the same names, and of the mixed kernel.
        part: what its kernels are mixed of, in a word.
        similarity: cosines of its n kernels or cells, (n, n); the same tensor for layers that share these.
    """

    name: str
    shape: str
    attentions: dict[str, Tensor]
    rows: dict[str, Row]
    part: str
    similarity: Tensor

    @property
    def whole(self) -> Row:
        """The row of the mixed kernel."""
        return self.rows[WHOLE]

    @property
    def static(self) -> bool:
        """Whether the layer convolves every image with the same kernel, in effect."""
        return verdict(self.whole) == VERDICTS[2]


@torch.no_grad()
def answer(model: nn.Module, batches: Iterable[Tensor]) -> tuple[Tensor, dict[str, Attentions]]:
    """Run a network on images, a few at a time, and keep its attentions.

    Args:
        model: the network.
        batches: its inputs, each (B, C, *map), on its device.

    Returns:
        What it answers, (B, classes), and the attentions of its layers, on the CPU.

    Raises:
        ValueError: the network has no dynamic layers.
    """
    answers: list[Tensor] = []
    parts: dict[str, list[Attentions]] = {}
    with recording(model) as recorded:
        for batch in batches:
            answers.append(model(batch).float().cpu())
            for name, attentions in recorded.items():
                parts.setdefault(name, []).append(attentions)
    joined = {
        name: Attentions(*(None if kind[0] is None else torch.cat(kind) for kind in zip(*of_layer, strict=True)))
        for name, of_layer in parts.items()
    }
    return torch.cat(answers), joined


def measure(model: nn.Module, recorded: dict[str, Attentions], labels: Tensor | None) -> list[Layer]:
    """Measure the layers of a network by their attentions on B images, of the classes `labels` (B) if known."""
    described = describe_attentions(model, recorded)
    layers = []
    similarity: dict[nn.Parameter, Tensor] = {}
    for name, attentions in recorded.items():
        layer: Any = model.get_submodule(name)
        values = {kind: value for kind in KINDS if (value := getattr(attentions, kind)) is not None}
        rows = {row["attention"]: row for row in described if row["layer"] == name}
        rows = {kind: rows[kind] | by_class(scatter(values[kind], labels)) for kind in values}
        rows[WHOLE] = describe_kernels(layer, name, scatter_of_kernels(layer, attentions, labels))
        if layer.parts not in similarity:
            similarity[layer.parts] = kernel_similarity(layer.parts)
        layers.append(Layer(name, describe_layer(layer), values, rows, layer.part, similarity[layer.parts]))
    return layers


def by_class(found: Scatter) -> Row:
    """Return the columns that speak of classes."""
    return {column: getattr(found, column) for column in CLASS_COLUMNS}


def describe_kernels(layer: Any, name: str, found: Scatter) -> Row:
    """Return the row of a layer's mixed kernel: root mean squares of the entries' mean and of what differs."""
    mean, between_images = (sqrt(part / found.entries) for part in (found.norm, found.total / found.images))
    row = {"layer": name, "attention": WHOLE, "mean": mean, "between_images": between_images}
    return {**dict.fromkeys(COLUMNS), **row, **by_class(found)}


def describe_layer(layer: Any) -> str:
    """Return the sizes of a layer: "64 to 128 channels, 3 x 3, 4 kernels"."""
    size = " x ".join(map(str, layer.kernel_size))
    return f"{layer.in_channels} to {layer.out_channels} channels, {size}, {count(len(layer.parts), layer.part)}"
