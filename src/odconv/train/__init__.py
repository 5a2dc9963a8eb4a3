"""Training, evaluating and using image classifiers."""

from typing import Any

from odconv.train.config import TrainConfig
from odconv.train.evaluation import evaluate
from odconv.train.prediction import predict

__all__ = ["TrainConfig", "evaluate", "predict", "train"]


def train(**options: Any) -> dict[str, Any]:
    """Train a network on images.

    Writes to the folder `out`: best.ckpt and last.ckpt, metrics.csv (a row an epoch), tensorboard/, config.yaml (the
    options, resolved; it is a recipe) and result.json.

    Args:
        **options: the fields of :class:`TrainConfig`.

    Returns:
        What is in result.json: accuracies in %, the best epoch, seconds an epoch.

    Raises:
        ValueError: an option that is not allowed or does not fit the data or a checkpoint.
        OSError: data, a checkpoint or `out` cannot be read or written.
    """
    config = TrainConfig(**options)
    from odconv.train.run import run

    return run(config)
