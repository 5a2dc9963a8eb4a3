"""How much of what changes from image to image is a matter of their classes."""

from math import nan, sqrt
from typing import NamedTuple

import torch
from torch import Tensor


class Scatter(NamedTuple):
    """Sums of squares of the entries of some images about their means; those of several sets of entries add up.

    Attributes:
        images: number of images.
        classes: number of their classes, 0 where these are not known.
        entries: number of entries.
        norm: square of the mean over the images.
        total: about that mean.
        between: of the means of classes about it, each counted for its images.
    """

    images: int
    classes: int
    entries: int
    norm: float
    total: float
    between: float

    @property
    def between_classes(self) -> float:
        """Root mean square deviation of an entry between classes; nan where these are not known."""
        return sqrt(self.between / self.images / self.entries) if self.classes else nan

    @property
    def within_classes(self) -> float:
        """Root mean square deviation of an entry within its class; nan where these are not known."""
        return sqrt(max(0.0, self.total - self.between) / self.images / self.entries) if self.classes else nan

    @property
    def class_share(self) -> float:
        """Share of the variance that lies between classes: 0 where they do not matter, 1 where nothing else does.

        Means of classes differ by chance, too, the more the fewer images they have; what is to be expected of that is
        taken off (epsilon squared). nan where there are no classes, or no class with two images.
        """
        if self.classes < 2 or self.images <= self.classes:
            return nan
        within = (self.total - self.between) / (self.images - self.classes)
        total = self.total / (self.images - 1)
        return min(1.0, max(0.0, 1 - within / total)) if total else 0.0

    def __add__(self, other: "Scatter") -> "Scatter":  # type: ignore[override]
        """Return the sums over both sets of entries."""
        summed = (a + b for a, b in zip(self[2:], other[2:], strict=True))
        return Scatter(self.images, self.classes, *summed)  # type: ignore[arg-type]  # entries are whole numbers


def scatter(values: Tensor, labels: Tensor | None = None) -> Scatter:
    """Measure values (B, ...) of B images, of the classes `labels` (B) if these are known."""
    values = values.flatten(1).float()
    mean = values.mean(0)
    distances = values - mean
    classes, between = 0, 0.0
    if labels is not None:
        names, index, counts = labels.unique(return_inverse=True, return_counts=True)
        classes = len(names)
        sums = torch.zeros(classes, values.shape[1]).index_add_(0, index, distances)
        between = (sums.square().sum(1, dtype=torch.float64) / counts).sum().item()
    norm, total = (tensor.square().sum(dtype=torch.float64).item() for tensor in (mean, distances))
    return Scatter(len(values), classes, values.shape[1], norm, total, between)
