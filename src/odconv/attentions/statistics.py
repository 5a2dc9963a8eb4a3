"""What the attentions of a network do, in numbers: whether they depend on the image, and whether the kernels differ."""

from collections.abc import Mapping
from math import log
from typing import Any

import torch
from torch import Tensor, nn

from odconv.attentions.recording import record_attentions
from odconv.layers import Attentions, PerSampleConv

SATURATED = 0.01
"""A gate is saturated within this share of its range of 0 or of its maximum: its gradient is 4 % of the greatest."""

COLUMNS = (
    "layer", "attention", "mean", "between_images", "between_entries", "saturated", "kernel_distance", "entropy",
)  # fmt: skip


def attention_statistics(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Measure the attentions of a network on some images; the network and all random states are left as they were.

    Args:
        model: a network, with or without dynamic layers.
        images: its input, (B, C, *map), on its device; some 16 to 32 images of several classes.

    Returns:
        A row for each dynamic layer and each of its attentions, with

        - ``layer``, ``attention``: the layer's name; channel, filter, spatial or kernel;
        - ``mean``: of their sizes, over all images and entries (channels, filters, taps, kernels, or of KernelWarehouse
          the cells of each piece, whose shares have signs);
        - ``between_images``: standard deviation over the images, averaged over the entries: what depends on the image;
        - ``between_entries``: standard deviation over the entries of the average over the images: what does not;
        - ``saturated``: share of values within 1 % of the ends of their range: 0 and the layer's gain; 0 and 1 for the
          kernel attention, -1 and 1 for that of KernelWarehouse;
        - ``kernel_distance``: root mean square distance of two of the n kernels or cells, divided by sqrt(2) times
          their root mean square norm: 0 for equal kernels, 1 for unrelated (orthogonal) ones; only for the kernel
          attention of n > 1 kernels, else None;
        - ``entropy``: mean entropy of an image's shares, whose sizes count relative to their sum, divided by log n: 1
          where all kernels have the same share, 0 where one has it all; None as above.

        No rows for a network without dynamic layers.
    """
    if not any(isinstance(module, PerSampleConv) for module in model.modules()):
        return []
    return describe_attentions(model, record_attentions(model, images))


def describe_attentions(model: nn.Module, recorded: Mapping[str, Attentions]) -> list[dict[str, Any]]:
    """Return the rows of :func:`attention_statistics`, of attentions that were recorded."""
    rows = []
    for name, attentions in recorded.items():
        layer: Any = model.get_submodule(name)
        for kind, values in attentions._asdict().items():
            if values is None:
                continue
            row = {
                "layer": name,
                "attention": kind,
                **_spread(values, *layer.attention.range_of(kind)),
            }
            if kind == "kernel" and len(layer.parts) > 1:
                row |= {"kernel_distance": kernel_distance(layer.parts.detach()), "entropy": mixture_entropy(values)}
            rows.append({column: _short(row.get(column)) for column in COLUMNS})
    return rows


def kernel_distance(kernels: Tensor) -> Tensor:
    """Return how much kernels (n, *shape), n > 1, differ: 0 for equal ones, 1 for orthogonal ones; exactly as above."""
    kernels = kernels.float().flatten(1)
    # the mean square distance of two is twice the variance, summed over the entries; var(0) takes 10 times as long
    variance = (kernels - kernels.mean(0)).square().sum() / (len(kernels) - 1)
    return (variance / kernels.square().sum(1).mean()).sqrt()


def mixture_entropy(shares: Tensor) -> Tensor:
    """Mean entropy of the shares (..., n), n > 1, relative to log n; exactly as above."""
    sizes = shares.float().abs()
    sizes = sizes / sizes.sum(-1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
    return torch.special.entr(sizes).sum(-1).mean() / log(shares.shape[-1])


def _spread(values: Tensor, low: float, high: float) -> dict[str, Tensor]:
    margin = SATURATED * (high - low)
    return {
        "mean": values.abs().mean(),
        "between_images": values.std(0, correction=0).mean(),
        "between_entries": values.mean(0).std(correction=0),
        "saturated": ((values < low + margin) | (values > high - margin)).float().mean(),
    }


def _short(value: Any) -> Any:
    return float(f"{value.item():.6g}") if isinstance(value, Tensor) else value
