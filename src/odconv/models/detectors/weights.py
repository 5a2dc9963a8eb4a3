"""Load a detector's weights: ours, torchvision's or mmdetection's."""

import re
from dataclasses import replace

from torch import nn

from odconv.checkpoints import Weights, find_checkpoint, load_all_but, load_checkpoint
from odconv.models.detectors import mmdetection_keys

PREDICTOR = re.compile(
    r"roi_heads\.(box_predictor|mask_predictor\.mask_fcn_logits)\.|head\.classification_head\.cls_logits\."
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
    if mmdetection_keys.is_checkpoint(checkpoint.state):
        mmdetection_keys.check_style(checkpoint)
        checkpoint = replace(checkpoint, state=mmdetection_keys.translate(checkpoint.state))
    if new_predictor:
        load_all_but(detector, checkpoint, PREDICTOR)
    else:
        load_checkpoint(detector, checkpoint)
