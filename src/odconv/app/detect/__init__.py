"""Detectors with feature pyramids on the networks of the zoo."""

from typing import Any

from odconv.app.detect.config import DetectConfig
from odconv.app.detect.evaluation import evaluate
from odconv.app.detect.prediction import predict

__all__ = ["DetectConfig", "evaluate", "predict", "train"]


def train(**options: Any) -> dict[str, Any]:
    """Train a detector on data in COCO's format.

    Writes to the folder `out`: best.ckpt (by the AP of boxes), last.ckpt and previous.ckpt, metrics.csv (one row per
    epoch), tensorboard/ or what `logger` says, config.yaml (the options, resolved; it is a recipe), defaults.yaml,
    machine.json, result.json, report.html. With `fast_dev_run`, nothing.

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
    from odconv.app.detect.run import run
    from odconv.app.engine.run_folder import trial

    with trial(config) as resolved:
        return run(resolved)
