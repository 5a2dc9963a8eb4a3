"""A trained network: from a checkpoint of ours alone, from others' with a description of the network."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from odconv.app.classify.config import Stem
from odconv.app.classify.released import open_released
from odconv.app.engine.config import check
from odconv.checkpoints import Checkpoint, find_checkpoint, find_released, load_checkpoint, malformed
from odconv.conversion.warehouse import NAME
from odconv.layers import try_temperature
from odconv.models.build import (
    METHODS,
    check_described,
    check_layer_options,
    create_model,
    norm_told,
    shapes_alone,
    split_name,
)
from odconv.models.zoo import BACKBONES, WAREHOUSE

BUDGETS = (1.0, 0.5, 4.0, 2.0, 0.25)
"""Published budgets of KernelWarehouse's networks."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a file of weights may leave unsaid of its network; None: what it says, else the default."""

    arch: str | None = None
    """Network of the checkpoint, such as od_resnet18; default: what the checkpoint says."""
    kernel_num: int | None = None
    """Kernels of its dynamic layers; default: what the checkpoint says, else that of the network."""
    reduction: float | None = None
    """Reduction of its attentions; default: what the checkpoint says, else that of the network."""
    stem: Stem | None = None
    """Its first layers; default: what the checkpoint says, else standard."""
    image_size: int | None = None
    """Side of the images, in pixels; default: what the checkpoint says, else 224."""
    resize_size: int | None = None
    """Shorter side before the centre is cropped, in pixels; default: what the checkpoint says, in proportion where
    image_size is another, else 8/7 of image_size."""
    temperature: float | None = None
    """Temperature of the attentions; default: what the checkpoint says, else 1."""


NAMES = tuple(field.name for field in fields(Description))


class Restored(NamedTuple):
    """A trained network, in evaluation mode, and how to use it.

    `classes` are the names of its outputs, those of the folders of its data, None where they are not known; `names` is
    what the classes are called, None where that is their names. Sizes are in pixels.
    """

    model: nn.Module
    arch: str
    classes: list[str] | None
    num_classes: int
    image_size: int
    resize_size: int
    names: list[str] | None = None


def restore(weights: str, **description: Any) -> Restored:
    """Build the network of a checkpoint, or of a folder of odconv release or its name, and load it.

    The fields of :class:`Description` say what the file does not. It is a ValueError if `arch` is needed, or a number
    is out of range, or the weights do not fit the network, or it has no temperature to set, or what the file says is
    malformed. The message says which network of the zoo the weights fit, if any.
    """
    given = {name: value for name, value in vars(Description(**description)).items() if value is not None}
    check(given)
    if (folder := find_released(weights)).is_dir():
        if named := [name for name in ("arch", "kernel_num", "reduction", "stem") if name in given]:
            raise ValueError(f"config.json of {weights} says what network it is; leave out {', '.join(named)}")
        return _of_folder(folder, given)
    checkpoint = find_checkpoint(weights)
    with malformed(checkpoint.path):
        return _restore(checkpoint, given)


def _restore(checkpoint: Checkpoint, given: dict[str, Any]) -> Restored:
    from odconv.app.data.transforms import evaluation_sizes  # with torchvision, which the command's help does without

    path, state, options = checkpoint.path, checkpoint.state, checkpoint.options
    recorded = "arch" in options
    if "detector" in options:
        raise ValueError(f"{path} is a detector, {options['detector']}: see odconv detect")
    if recorded and given.get("arch", options["arch"]) != options["arch"]:
        raise ValueError(f"arch must be {options['arch']}, the network of {path}, got {given['arch']}")
    check(options)
    sizes = evaluation_sizes(given.get("image_size"), given.get("resize_size"), options)
    options |= given
    if "arch" not in options:
        raise ValueError(f"arch must be given, since {path} holds weights alone{_hint(state)}")
    num_classes = count_classes(state)
    if num_classes is None:
        raise ValueError(f"{path} holds no classifier")
    layer_options = norm_told(options["arch"], state) | (options.get("layer_options") or {})
    check_layer_options(options["arch"], layer_options)  # what a file says must not be any argument of create_model
    if split_name(options["arch"])[0] == WAREHOUSE and "budget" not in layer_options:
        layer_options["budget"] = find_budget(state, options["arch"])
    described = {
        "kernel_num": options.get("kernel_num"),
        "reduction": options.get("reduction"),
        "num_classes": num_classes,
        "stem": options.get("stem", "standard"),
        **layer_options,
    }
    check_described(path, options["arch"], **described)
    model = create_model(options["arch"], **described)
    try:
        load_checkpoint(model, checkpoint)  # with the temperature that the file records
    except ValueError as error:
        raise ValueError(f"{error}{'' if recorded else _hint(state)}") from error
    _set_temperature(model, options["arch"], given.get("temperature"))
    return Restored(model.eval(), options["arch"], checkpoint.notes.get("classes"), num_classes, *sizes)


def _of_folder(folder: Path, given: dict[str, Any]) -> Restored:
    from odconv.app.data.transforms import evaluation_sizes

    network, notes = open_released(folder)
    name, outputs = network.config["name"], network.config["num_classes"]
    _set_temperature(network.model, name, given.get("temperature"))
    sizes = evaluation_sizes(given.get("image_size"), given.get("resize_size"), notes)
    return Restored(network.model, name, notes.get("classes"), outputs, *sizes, notes.get("names"))


def _set_temperature(model: nn.Module, arch: str, temperature: float | None) -> None:
    if temperature is not None and not try_temperature(model, temperature):
        raise ValueError(f"temperature must not be given: no layer of {arch} has one")


def count_classes(state: dict[str, Tensor]) -> int | None:
    """Return the number of a classifier's outputs by its weights; None where these hold none."""
    parts = {key: tensor for key, tensor in state.items() if ".attention." not in key}
    matrices = [tensor for tensor in parts.values() if tensor.ndim == 2]
    biases = [tensor for key, tensor in parts.items() if key.endswith("classifier.1.conv.bias")]  # of a layer of cells
    return next((len(tensor) for tensor in reversed(matrices or biases)), None)


def find_budget(state: dict[str, Tensor], arch: str) -> float:
    """Return the budget of a network of KernelWarehouse by its cells, since published files lack it; 1 if none fits."""

    def cells(tensors: Mapping[str, Tensor]) -> list[torch.Size]:
        return [tensor.shape for key, tensor in tensors.items() if key.startswith(f"{NAME}.weights.")]

    for budget in BUDGETS:
        with shapes_alone(), suppress(ValueError):  # of budgets that the widths do not allow
            if cells(create_model(arch, budget=budget).state_dict()) == cells(state):
                return budget
    return 1.0


def _hint(state: dict[str, Tensor]) -> str:
    """Say which network of the zoo weights fit."""
    fitting = fitting_networks(state)
    return f"; it fits {' or '.join(fitting)}" if fitting else ""


def fitting_networks(state: dict[str, Tensor]) -> list[str]:
    """List the networks of the zoo that weights fit, by the options of the command line that build them."""
    kernel_num = next((tensor.shape[0] for tensor in state.values() if tensor.ndim == 5), None)  # (n, O, C, kh, kw)
    found = []
    for backbone, stem in product(BACKBONES, get_args(Stem)):
        if _convolutions(_described(backbone, stem)) == _convolutions(state):
            for arch in [f"{method}_{backbone}" for method in METHODS] if kernel_num else [backbone]:
                if _keys(_described(arch, stem, kernel_num)) == _keys(state):
                    options = {"arch": arch, "kernel_num": kernel_num, "stem": None if stem == "standard" else stem}
                    found.append(" ".join(f"--{name} {value}" for name, value in options.items() if value is not None))
    return found


def _described(arch: str, stem: Stem, kernel_num: int | None = None) -> dict[str, Tensor]:
    with shapes_alone():
        return create_model(arch, stem=stem, kernel_num=kernel_num).state_dict()


def _convolutions(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shapes of convolutions, in dynamic ones those of a single kernel."""
    return {key: tensor.shape[-4:] for key, tensor in state.items() if tensor.ndim > 3 and ".attention." not in key}


def _keys(state: dict[str, Tensor]) -> set[str]:
    return {key for key in state if not key.endswith("num_batches_tracked")}
