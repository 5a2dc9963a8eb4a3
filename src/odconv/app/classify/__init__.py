"""Training and evaluating image classifiers."""

from typing import Any

from odconv.app.classify.config import TrainConfig
from odconv.app.classify.evaluation import evaluate

__all__ = ["TrainConfig", "evaluate", "train"]


def train(**options: Any) -> dict[str, Any]:
    """Train a network on images.

    Writes to the folder `out`: best.ckpt, last.ckpt and previous.ckpt, metrics.csv (one row per epoch), attentions.csv,
    tensorboard/ or what `logger` says, config.yaml (the options, resolved; it is a recipe), defaults.yaml,
    machine.json, result.json and report.html. With `fast_dev_run`, nothing.

    Args:
        **options: the fields of :class:`TrainConfig`.

    Returns:
        What is in result.json: accuracies in %, the best epoch, seconds an epoch.

    Raises:
        ValueError: an option that is not allowed or does not fit the data or a checkpoint.
        OSError: data, a checkpoint or `out` cannot be read or written, or other processes were lost.
        FloatingPointError: the loss stays infinite or not a number.
    """
    config = TrainConfig(**options)
    from odconv.app.classify.run import run
    from odconv.app.engine.run_folder import trial

    with trial(config) as resolved:
        return run(resolved)
