"""Loading weights into detectors: a classifier's into the backbone, a detector's into the whole."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from odconv.checkpoints import Weights, find_checkpoint, load_checkpoint
from odconv.models.detectors import mmdetection_keys
from odconv.system.text import first_few

PREDICTOR = re.compile(
    r"roi_heads\.(box_predictor|mask_predictor\.mask_fcn_logits)\.|classification_head\.cls_logits\."
)
"""Tensors whose shape depends on the number of classes."""


def load_detector(detector: nn.Module, weights: Weights, new_predictor: bool = False) -> None:
    """Load the checkpoint of a detector: one of ours, torchvision's or mmdetection's.

    Args:
        detector: what :func:`odconv.create_detector` builds; for mmdetection's files with its conventions.
        weights: a path, or a name on the Hugging Face Hub.
        new_predictor: leave the detector's last layers, which tell the classes, as they are: for other classes than
            those of the file. All else must fit.

    Raises:
        FileNotFoundError, ValueError, OSError: as :func:`odconv.load_checkpoint`; the detector is left untouched.
    """
    checkpoint = find_checkpoint(weights)
    state = checkpoint.state
    published = mmdetection_keys.is_checkpoint(state)
    if published:
        mmdetection_keys.check_style(checkpoint)
    translated = mmdetection_keys.translate(state) if published else dict(state)
    own = detector.state_dict()
    if new_predictor:
        kept = {key: tensor.clone() for key, tensor in own.items() if PREDICTOR.search(key)}
        translated = {key: tensor for key, tensor in translated.items() if not PREDICTOR.search(key)}
    elif not published:
        load_checkpoint(detector, checkpoint)
        return
    else:
        kept = {}
    _check(
        translated,
        {key: tensor for key, tensor in own.items() if key not in kept},
        type(detector).__name__,
        checkpoint.path,
    )
    if published:
        detector.load_state_dict(translated, strict=False)
    else:  # with what is recorded beside the tensors
        load_checkpoint(detector, checkpoint, strict=False)
        detector.load_state_dict(kept, strict=False)


def _check(state: Mapping[str, Tensor], own: Mapping[str, Tensor], detector: str, path: Path) -> None:
    """See that the tensors fit those of a detector."""
    lines = [f"{key} is missing" for key in own if key not in state and not key.endswith("num_batches_tracked")]
    lines += [f"{key} is unknown" for key in state if key not in own]
    lines += [
        f"{key} is {tuple(tensor.shape)} in the file, {tuple(own[key].shape)} in the detector"
        for key, tensor in state.items()
        if key in own and own[key].shape != tensor.shape
    ]
    lines += [
        f"{key} is complex in the file, real in the detector"
        for key, tensor in state.items()
        if key in own and tensor.is_complex() and not own[key].is_complex()
    ]
    if lines:
        problems = first_few(lines, "\n  ")
        raise ValueError(
            f"the checkpoint {path} does not fit the {detector}; another detector, backbone, kernel_num, reduction or "
            f"num_classes?\n  {problems}"
        )
