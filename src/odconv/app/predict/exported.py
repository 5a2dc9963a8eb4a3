"""A classifier from an exported file, ours or others'."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from odconv.app.data.transforms import MEAN, STD, evaluation_sizes
from odconv.app.engine.config import LARGEST_SIDE
from odconv.app.predict.classifier import Classifier, class_names
from odconv.export.opened import open_exported

logger = logging.getLogger(__name__)


def exported_classifier(
    path: Path, image_size: int | None, resize_size: int | None, classes: str | None, trust: bool = False
) -> Classifier:
    """Open a file; what it does not say is assumed, and named in a warning.

    It is a ValueError if it is no classifier of images, or takes images of another size alone.
    """
    file = open_exported(path, trust)
    if file.takes_sizes:
        raise ValueError(f"{path} must take images alone, but it takes their sizes too, as a detector's backbone does")
    notes = _sound(file.notes)
    batch, side = _batch_and_side(path, file.shape)
    if image_size is not None and side not in (image_size, None):
        raise ValueError(f"image_size must be {side}, the only size that {path} takes, got {image_size}")
    size, resized = evaluation_sizes(image_size or side, resize_size, notes)
    known: dict[str, Any] = {
        "image_size": image_size or side or "image_size" in notes,
        "resize_size": resize_size or {"image_size", "resize_size"} <= notes.keys(),
    }
    output = _output(path, file.outputs)
    classifier = Classifier(
        name=notes.get("arch", path.name),
        compute=lambda images: file.compute(images)[output],
        classes=class_names(classes, notes.get("classes"), _number_of_classes(path, file.compute, output, batch, size)),
        image_size=size,
        resize_size=resized,
        device=torch.device("cpu"),
        mean=notes.get("mean", MEAN),
        std=notes.get("std", STD),
        batch=batch,
    )
    known |= {"mean": "mean" in notes, "std": "std" in notes, "batch": file.shape}
    if assumed := [f"{name} = {getattr(classifier, name)}" for name in known if not known[name]]:
        logger.warning("%s does not say all that is needed; assumed: %s", path, ", ".join(assumed))
    return classifier


def _batch_and_side(path: Path, shape: Sequence[int | None] | None) -> tuple[int | None, int | None]:
    """How many images at a time, and of which side, a file takes; None for any, and one image where it is not known."""
    batch, channels, height, width = (1, 3, None, None) if shape is None else shape if len(shape) == 4 else (0,) * 4
    if channels not in (3, None) or height != width:
        raise ValueError(f"{path} must take images (batch, 3, side, side), but it takes {_text(shape or ())}")
    return batch, height


def _output(path: Path, outputs: list[str]) -> int:
    if len(outputs) > 1 and "logits" not in outputs:
        raise ValueError(f"{path} must have one output, or one called logits, but it has {', '.join(outputs)}")
    return outputs.index("logits") if "logits" in outputs else 0


def _number_of_classes(path: Path, compute: Any, output: int, batch: int | None, side: int) -> int:
    """Compute once, to see that it works and what it gives."""
    images = batch or 1
    try:
        logits = compute(torch.zeros(images, 3, side, side))[output]
    except Exception as error:  # whatever the engine raises
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{path} cannot compute images of {side} x {side} pixels: {reason}") from error
    if logits.ndim != 2 or len(logits) != images:
        raise ValueError(f"{path} must give logits (batch, classes), but it gives {_text(logits.shape)}")
    return logits.shape[1]


def _sound(notes: dict[str, Any]) -> dict[str, Any]:
    """Return the notes that are ours by their form; others may use the same names."""

    def channels(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 3 and all(isinstance(v, float | int) for v in value)

    forms = {
        "arch": lambda value: isinstance(value, str),
        "classes": lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
        "image_size": lambda value: isinstance(value, int) and 0 < value <= LARGEST_SIDE,
        "resize_size": lambda value: isinstance(value, int) and 0 < value <= LARGEST_SIDE,
        "mean": channels,
        "std": channels,
    }
    return {name: notes[name] for name, sound in forms.items() if name in notes and sound(notes[name])}


def _text(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if extent is None else str(extent) for extent in shape)})"
