"""What networks say of an image, and how soon."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from odconv.app.data import normalise
from odconv.app.predict import Classifier, load_classifier
from odconv.layers import PerSampleConv
from odconv.profiling.latency import latencies
from odconv.system.files import is_exported
from odconv.system.text import first_few

TOP = 5
RUNS = 5
"""Timed passes of each network through an image."""


class Network(NamedTuple):
    """A classifier, the network in it, and the network's dynamic layers by their names."""

    classifier: Classifier
    model: nn.Module
    layers: dict[str, PerSampleConv]


class Answer(NamedTuple):
    """What a network says of an image: the most probable classes, in %, and its median time for it alone."""

    network: Network
    top: list[tuple[str, float]]
    milliseconds: float


def load(weights: str, static: str | None, static_arch: str | None, **options: Any) -> list[Network]:
    """Load a network, and perhaps one to compare it with, which comes first: of the same classes and sizes of images.

    Options are what `weights` does not say; classes, stem, sizes and device hold for both.
    """
    for given in (weights, static):
        if given is not None and is_exported(given):  # not opened, then refused
            raise ValueError(f"{given} is an exported network, which nobody can look into; give its checkpoint")
    classifiers = [load_classifier(weights, trust=False, **options)]
    if static is not None:
        both = ("classes", "stem", "image_size", "resize_size", "device")
        shared = {name: options[name] for name in both if name in options}
        classifiers.insert(0, load_classifier(static, arch=static_arch, **shared))
    for what in ("classes", "image_size", "resize_size"):
        values = [getattr(classifier, what) for classifier in classifiers]
        if any(value != values[0] for value in values):
            shown = (str(value) if isinstance(value, int) else f"{len(value)} ({first_few(value)})" for value in values)
            raise ValueError(f"{what} of both networks must be the same, got {' and '.join(shown)}")
    networks = []
    for classifier in classifiers:
        model = classifier.model
        assert model is not None  # exported files have none
        layers = {name: module for name, module in model.named_modules() if isinstance(module, PerSampleConv)}
        networks.append(Network(classifier, model, layers))
    return networks


def ask(networks: Sequence[Network], image: Image.Image) -> list[Answer]:
    """Let each network classify an image; for the times they take turns."""
    x = prepare(networks[0].classifier, [image])
    times = latencies([network.model for network in networks], x, RUNS)
    answers = []
    for network, seconds in zip(networks, times, strict=True):
        names = network.classifier.classes
        with torch.no_grad():
            best = network.model(x)[0].float().softmax(dim=0).mul(100).topk(min(TOP, len(names)))
        top = [(names[i], share) for i, share in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        answers.append(Answer(network, top, 1000 * seconds))
    return answers


def prepare(classifier: Classifier, images: Sequence[Image.Image]) -> Tensor:
    """Return what a network sees of some images, (B, 3, image_size, image_size)."""
    pixels = torch.stack([classifier.prepare(image) for image in images])
    return normalise(pixels.to(classifier.device), classifier.mean, classifier.std)
