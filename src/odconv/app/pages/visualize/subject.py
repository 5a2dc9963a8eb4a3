"""What was looked at, in words and numbers: a network and what it made of some images."""

from dataclasses import dataclass
from functools import cached_property
from math import isnan

import torch
from torch import Tensor

from odconv.app.pages.visualize.images import Pictures
from odconv.attentions.measurement import Layer
from odconv.attentions.verdicts import VERDICTS, verdict
from odconv.layers.starts import WARM_GATES
from odconv.system.text import count, number

HOT = WARM_GATES["temperature"]
"""Temperature above which attentions are held back."""


@dataclass(frozen=True)
class Subject:
    """A network on some images: what it answers to them, (B, outputs), and its dynamic layers.

    `weights` is the name of its file, `answers` what its outputs are called; temperature and blend are None where its
    method has none.
    """

    arch: str
    weights: str
    answers: list[str]
    temperature: float | None
    pictures: Pictures
    probabilities: Tensor
    layers: list[Layer]
    blend: float | None = None

    @property
    def title(self) -> str:
        """The network: "od_resnet18, 4 kernels"."""
        most = max(self.layers, key=lambda layer: len(layer.similarity))
        return f"{self.arch}, {count(len(most.similarity), most.part)}"

    @cached_property
    def class_names(self) -> list[str]:
        """The classes of the images, in the order in which they come; none where they are not known."""
        return list(dict.fromkeys(self.pictures.classes or []))

    @property
    def compares_classes(self) -> bool:
        """Whether the images can tell what differs between classes: some class has several."""
        return 1 < len(self.class_names) < len(self.pictures.paths)

    @property
    def sentence(self) -> str:
        """What is dynamic, in a sentence."""
        given = [verdict(layer.whole) for layer in self.layers]
        phrases = (
            "varies with the image",
            "varies slightly",
            "is in effect the same for every image",
            "is not a number",
        )
        counts = {text: given.count(word) for text, word in zip(phrases, VERDICTS, strict=True) if word in given}
        first, *others = (f"{text} in {many}" for text, many in counts.items())
        return f"The kernel {first} of {count(len(given), 'dynamic layer')}{''.join(f', {other}' for other in others)}."

    @property
    def notes(self) -> list[str]:
        """What to know about it."""
        notes = []
        if not self.class_names:
            notes.append(
                "The classes of the images are not known, so what differs between classes is left out: give a folder "
                "with a subfolder for each class."
            )
        elif not self.compares_classes:
            notes.append("No class has several images, so what differs between classes is left out.")
        if strange := [name for name in self.class_names if name not in self.answers]:
            notes.append(f"The network knows no class of the name {strange[0]}, so its accuracy is left out.")
        if self.temperature is not None and self.temperature > HOT:
            notes.append(
                f"The temperature of the attentions is {self.temperature:g}: they can hardly vary until training has "
                "brought it down to 1."
            )
        if self.blend:
            notes.append(
                f"The blend of the attentions is {self.blend:g}: so much of every kernel is fixed until training has "
                "brought it down to 0."
            )
        if any(isnan(row["mean"]) for layer in self.layers for row in layer.rows.values()):
            notes.append("The network computes values that are not numbers.")
        return notes

    @property
    def numbers(self) -> dict[str, str]:
        """The numbers to begin with, by what they are."""
        found = {"images": number(len(self.pictures.paths), 0)}
        if self.class_names:
            found["classes"] = number(len(self.class_names), 0)
        if self.class_names and {*self.class_names} <= {*self.answers}:
            chosen = [self.answers[index] for index in self.probabilities.argmax(1).tolist()]
            right = [answer == name for answer, name in zip(chosen, self.pictures.classes or [], strict=True)]
            found["top-1 on them"] = number(100 * sum(right) / len(right), 1, " %")
        found["dynamic layers"] = number(len(self.layers), 0)
        found["in effect static"] = number(sum(layer.static for layer in self.layers), 0)
        if self.temperature is not None:
            found["temperature"] = f"{self.temperature:g}"
        if self.blend is not None:
            found["blend"] = f"{self.blend:g}"
        return found


def as_labels(classes: list[str] | None) -> Tensor | None:
    """Classes as numbers, in the order in which they come."""
    names = list(dict.fromkeys(classes or []))
    return torch.tensor([names.index(name) for name in classes]) if classes else None
