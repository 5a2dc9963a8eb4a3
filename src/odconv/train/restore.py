"""A trained network: from a checkpoint of ours alone, from others' with a description of the network."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from odconv.checkpoints import load_checkpoint, read_state_dict, resolve
from odconv.layers import set_temperature
from odconv.models import create_model
from odconv.train.config import Stem, check


class Restored(NamedTuple):
    """A trained network.

    Attributes:
        model: the network, in evaluation mode.
        arch: its name.
        classes: names of its outputs; None where they are not known.
        num_classes: number of its outputs.
        image_size: side of the images to give it, in pixels.
        resize_size: shorter side before the centre is cropped, in pixels.
    """

    model: nn.Module
    arch: str
    classes: list[str] | None
    num_classes: int
    image_size: int
    resize_size: int


def restore(
    weights: str,
    *,
    arch: str | None = None,
    kernel_num: int | None = None,
    reduction: float | None = None,
    stem: Stem | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
    temperature: float | None = None,
) -> Restored:
    """Build the network of a checkpoint and load it.

    Args:
        weights: A checkpoint of odconv train, which says all of the rest, or another file of weights.
        arch: Network of the checkpoint, such as od_resnet18; default: what the checkpoint says.
        kernel_num: Kernels of its dynamic layers; default: what the checkpoint says, else that of the network.
        reduction: Reduction of its attentions; default: what the checkpoint says, else that of the network.
        stem: Its first layers; default: what the checkpoint says, else standard.
        image_size: Side of the images, in pixels; default: what the checkpoint says, else 224.
        resize_size: Shorter side before the centre is cropped, in pixels; default: what the checkpoint says, else 256.
        temperature: Temperature of the attentions; default: what the checkpoint says, else 1.

    Returns:
        The network and how to use it.

    Raises:
        ValueError: `arch` is needed, or a number is out of range, or the weights do not fit the network.
        OSError: the file cannot be read.
    """
    numbers = {"kernel_num": kernel_num, "reduction": reduction, "image_size": image_size, "resize_size": resize_size}
    check({**numbers, "temperature": temperature})
    path = resolve(weights)
    state = read_state_dict(path)
    options, notes = saved_by_training(path)
    given = {"arch": arch, "stem": stem, **numbers}
    options |= {name: value for name, value in given.items() if value is not None}
    if "arch" not in options:
        raise ValueError(f"arch must be given, since {path} holds weights alone")
    classifier = [tensor for tensor in state.values() if tensor.ndim == 2]
    if not classifier:
        raise ValueError(f"{path} holds no classifier")
    num_classes = classifier[-1].shape[0]
    model = create_model(
        options["arch"],
        kernel_num=options.get("kernel_num"),
        reduction=options.get("reduction"),
        num_classes=num_classes,
        stem=options.get("stem", "standard"),
    )
    load_checkpoint(model, path)  # with the temperature that the file records
    if temperature is not None:
        set_temperature(model, temperature)
    return Restored(
        model.eval(),
        options["arch"],
        notes.get("classes"),
        num_classes,
        options.get("image_size", 224),
        options.get("resize_size", 256),
    )


def saved_by_training(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the run and what else `odconv train` noted beside the weights."""
    if path.suffix == ".safetensors":
        return {}, {}
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return (checkpoint["hyper_parameters"], checkpoint["odconv"]) if "odconv" in checkpoint else ({}, {})
