"""Loading a classifier from any file."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odconv.app.classify.config import Stem
from odconv.app.classify.restore import restore
from odconv.app.data.transforms import evaluation_sizes
from odconv.app.engine.config import check
from odconv.app.predict.classifier import Classifier
from odconv.app.predict.exported import exported_classifier
from odconv.app.predict.names import class_names
from odconv.checkpoints import SUFFIXES as CHECKPOINTS
from odconv.checkpoints import malformed, resolve
from odconv.export.opened import SUFFIXES as EXPORTED
from odconv.layers import set_temperature
from odconv.system.devices import Device, find_device


def load_classifier(
    weights: str,
    *,
    arch: str | None = None,
    kernel_num: int | None = None,
    reduction: float | None = None,
    stem: Stem | None = None,
    temperature: float | None = None,
    image_size: int | None = None,
    resize_size: int | None = None,
    classes: str | None = None,
    device: Device = "auto",
    trust: bool = False,
) -> Classifier:
    """Load a trained classifier.

    Args:
        weights: A checkpoint of odconv train, an exported file (.onnx or .pt2), a folder that HubModel saved, or
            owner/name on the Hugging Face Hub; these say what network it is. Or another file of weights, with arch.
        arch: Network of the weights, such as od_resnet18; default: what the checkpoint says.
        kernel_num: Kernels of its dynamic layers; default: what the checkpoint says, else that of the network.
        reduction: Reduction of its attentions; default: what the checkpoint says, else that of the network.
        stem: Its first layers; default: what the checkpoint says, else standard.
        temperature: Temperature of the attentions; default: what the checkpoint says, else 1.
        image_size: Side of the images, in pixels; default: what the file says, else 224.
        resize_size: Shorter side before the centre is cropped, in pixels; default: what the file says, in proportion
            where image_size is another, else 8/7 of image_size.
        classes: Text file with the name of a class in each line; default: what the file says, else ImageNet's names for
            1,000 classes.
        device: Where to compute: cpu, gpu, or auto for a GPU if there is one.
        trust: Open a .pt2 file, which can run code as it is opened; other files cannot and need no trust.

    Returns:
        The classifier; an exported file computes where it was made for.

    Raises:
        ValueError: an option that does not fit, or is missing, or weights that do not fit the network, or a file that
            holds no classifier of images, or a .pt2 file that is not trusted.
        OSError: a file cannot be read.
        ImportError: a package is missing.
    """
    network: dict[str, Any] = {"arch": arch, "kernel_num": kernel_num, "reduction": reduction, "stem": stem}
    check({**network, "temperature": temperature, "image_size": image_size, "resize_size": resize_size})
    path, given = Path(weights), [name for name, value in network.items() if value is not None]
    if path.suffix in EXPORTED and not path.is_dir():
        given += ["temperature"] * (temperature is not None) + ["device"] * (device != "auto")
        if given:
            raise ValueError(f"{weights} is an exported network; leave out {', '.join(given)}")
        return exported_classifier(path, image_size, resize_size, classes, trust)
    place = find_device(device)
    if path.is_dir() or (arch is None and _is_repository(weights)):
        if given:
            raise ValueError(f"config.json of {weights} says what network it is; leave out {', '.join(given)}")
        return _from_hub(weights, temperature, image_size, resize_size, classes, place)
    restored = restore(weights, temperature=temperature, image_size=image_size, resize_size=resize_size, **network)
    names = class_names(classes, restored.classes, restored.num_classes)
    return _of_model(restored.model, restored.arch, names, restored.image_size, restored.resize_size, place)


def _of_model(
    model: nn.Module, name: str, classes: list[str], image_size: int, resize_size: int, device: torch.device
) -> Classifier:
    return Classifier(
        name=name,
        compute=model.to(device),
        classes=classes,
        image_size=image_size,
        resize_size=resize_size,
        device=device,
        model=model,
    )


def _is_repository(weights: str) -> bool:
    name = weights.removeprefix("hf://")
    looks_so = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not name.endswith(CHECKPOINTS)
    return bool(looks_so) and not Path(weights).exists()


def _from_hub(
    weights: str,
    temperature: float | None,
    image_size: int | None,
    resize_size: int | None,
    classes: str | None,
    device: torch.device,
) -> Classifier:
    from odconv.hub import CONFIG, WEIGHTS, HubModel

    folder = Path(weights)
    if not folder.is_dir():
        repository = f"hf://{weights.removeprefix('hf://')}"
        resolve(f"{repository}/{WEIGHTS}")
        folder = resolve(f"{repository}/{CONFIG}").parent
    elif missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        files = sorted(file.name for file in folder.iterdir() if file.name.endswith((*CHECKPOINTS, *EXPORTED)))
        hint = f"; did you mean {' or '.join(str(folder / name) for name in files[:3])}?" if files else ""
        raise FileNotFoundError(f"the folder {folder} has no {' and no '.join(missing)}{hint}")
    with malformed(folder / CONFIG):
        model = HubModel.from_pretrained(folder)
    if temperature is not None:
        set_temperature(model, temperature)
    names = class_names(classes, None, model.config["num_classes"])
    return _of_model(model.model, model.config["name"], names, *evaluation_sizes(image_size, resize_size), device)
