"""The images themselves, with where the network looked."""

import base64
import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from odconv.app.data import normalise
from odconv.app.pages.colours import FAINT, INK
from odconv.app.pages.drawing import WIDTH, Drawing, on_paper
from odconv.app.pages.visualize.by_layer import shorten
from odconv.app.pages.visualize.gradcam import grad_cam, overlay
from odconv.app.pages.visualize.subject import Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ACROSS = 4
SMALLEST = 112
"""Side of an image in pixels; smaller ones are enlarged."""


class Example(NamedTuple):
    """An image (H, W, 3) of bytes, and what the network made of it.

    `looked` is the same, coloured by Grad-CAM; None where there is no map for it. `probability` is that of the answer
    in %, `name` the class of the image; None where it is not known.
    """

    pixels: np.ndarray
    looked: np.ndarray | None
    answer: str
    probability: float
    name: str | None

    @property
    def words(self) -> str:
        """What it was taken for: "cat 97 %"."""
        return f"{shorten(self.answer)} {self.probability:.0f} %"

    @property
    def correction(self) -> str:
        """What it is, where it was taken for something else."""
        return "" if self.name in (None, self.answer) else f"is {shorten(self.name or '')}"

    @property
    def sources(self) -> list[str]:
        """The pictures as addresses that hold them."""
        return [embed(pixels) for pixels in (self.pixels, self.looked) if pixels is not None]


def explain_examples(
    subject: Subject, model: nn.Module, device: torch.device, indices: Sequence[int], layer: str | None
) -> list[Example]:
    """Look at some of a subject's images, by Grad-CAM on a layer, if there is one, for the class chosen of each."""
    sure, chosen = subject.probabilities[indices].max(1)
    heats: list[Tensor | None] = [None] * len(indices)
    if layer is not None:
        inputs = normalise(subject.pictures.pixels[indices].to(device))
        heats = [*grad_cam(model, layer, inputs, chosen.to(device))]
    pixels = [enlarge(image.movedim(0, -1).numpy()) for image in subject.pictures.pixels[indices]]
    return [
        Example(
            image,
            None if heat is None else overlay(image, heat),
            subject.answers[best],
            100 * probability,
            subject.pictures.classes[index] if subject.pictures.classes else None,
        )
        for index, image, heat, best, probability in zip(
            indices, pixels, heats, chosen.tolist(), sure.tolist(), strict=True
        )
    ]


def enlarge(pixels: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) in larger pixels, where it is too small."""
    times = -(-SMALLEST // min(pixels.shape[:2]))
    return pixels.repeat(times, 0).repeat(times, 1)


def embed(pixels: np.ndarray) -> str:
    """Return an image (H, W, 3) as an address that holds it, as a JPEG."""
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=88)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def draw_examples(examples: Sequence[Example]) -> Drawing:
    """Draw the images in lines, each beside where the network looked, with what it took it for."""
    cell = (WIDTH - 0.1) / ACROSS
    height = cell / 2 + 0.36
    lines = -(-len(examples) // ACROSS)
    title = "The images, and where the network looked"
    return on_paper(title, 0.05 + lines * height, partial(fill, examples=examples, cell=cell, height=height))


def fill(axes: "Axes", examples: Sequence[Example], cell: float, height: float) -> None:
    """Draw the lines of images."""
    side = (cell - 0.12) / 2
    for index, example in enumerate(examples):
        line, column = divmod(index, ACROSS)
        x, y = 0.1 + column * cell, 0.05 + line * height
        for place, pixels in enumerate((example.pixels, example.looked)):
            if pixels is not None:
                left = x + place * (side + 0.02)
                axes.imshow(pixels, extent=(left, left + side, y + side, y), aspect="auto")
        axes.text(x, y + side + 0.09, example.words, size=6.5, va="center", color=INK)
        axes.text(x, y + side + 0.21, example.correction, size=6.5, va="center", color=FAINT)
