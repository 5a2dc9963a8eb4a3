"""Loading a classifier from any file."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from odconv.app.classify.config import Stem
from odconv.app.classify.released import NOTES
from odconv.app.classify.restore import restore
from odconv.app.engine.config import check
from odconv.app.predict.classifier import Classifier, class_names
from odconv.app.predict.exported import exported_classifier
from odconv.checkpoints import SUFFIXES as CHECKPOINTS
from odconv.checkpoints import resolve
from odconv.system.devices import Device, find_device
from odconv.system.files import is_exported


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
        weights: A checkpoint of odconv train, an exported file (.onnx or .pt2), a folder of odconv release or HubModel,
            the name of one in the folder weights, or owner/name on the Hugging Face Hub; these say what network it is.
            Or another file of weights, with arch.
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
    if is_exported(path):
        given += ["temperature"] * (temperature is not None) + ["device"] * (device != "auto")
        if given:
            raise ValueError(f"{weights} is an exported network; leave out {', '.join(given)}")
        return exported_classifier(path, image_size, resize_size, classes, trust)
    place = find_device(device)
    if arch is None and _is_repository(weights):
        weights = str(_download(weights))
    restored = restore(weights, temperature=temperature, image_size=image_size, resize_size=resize_size, **network)
    names = class_names(classes, restored.names or restored.classes, restored.num_classes)
    return Classifier(
        name=restored.arch,
        compute=restored.model.to(place),
        classes=names,
        image_size=restored.image_size,
        resize_size=restored.resize_size,
        device=place,
        model=restored.model,
    )


def _is_repository(weights: str) -> bool:
    name = weights.removeprefix("hf://")
    looks_so = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not name.endswith(CHECKPOINTS)
    return bool(looks_so) and not Path(weights).exists()


def _download(repository: str) -> Path:
    """Return the folder to which a repository of the Hub was downloaded."""
    from odconv.hub import CONFIG, WEIGHTS

    name = f"hf://{repository.removeprefix('hf://')}"
    with suppress(FileNotFoundError):  # only what odconv release wrote has it
        resolve(f"{name}/{NOTES}")
    resolve(f"{name}/{WEIGHTS}")
    return resolve(f"{name}/{CONFIG}").parent
