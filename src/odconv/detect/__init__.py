"""Detectors with feature pyramids on the networks of the zoo."""

from typing import Any

from odconv.detect.builder import create_detector
from odconv.detect.config import DetectConfig
from odconv.detect.evaluation import evaluate
from odconv.detect.prediction import predict
from odconv.detect.weights import load_backbone, load_detector

__all__ = ["DetectConfig", "create_detector", "evaluate", "load_backbone", "load_detector", "predict", "train"]


def train(**options: Any) -> dict[str, Any]:
    """Train a detector on data in COCO's format.

    Writes to the folder `out`: best.ckpt (by the AP of boxes), last.ckpt and previous.ckpt, metrics.csv (a row an
    epoch), tensorboard/, config.yaml (the options, resolved; it is a recipe), machine.json, result.json, report.html.

    Args:
        **options: the fields of :class:`DetectConfig`.

    Returns:
        What is in result.json: scores in %, the best epoch, seconds.

    Raises:
        ValueError: an option that is not allowed or does not fit the data or a checkpoint.
        OSError: data, a checkpoint or `out` cannot be read or written, or other processes were lost.
        FloatingPointError: the loss stays infinite or not a number.
    """
    config = DetectConfig(**options)
    from odconv.detect.run import run

    return run(config)
