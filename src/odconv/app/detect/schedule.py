"""The learning rate during a detector's training, as a function of how far it has come."""

from odconv.app.detect.config import DetectConfig


def learning_rate(config: DetectConfig, epoch: int, step: int) -> float:
    """Return the learning rate of a step: it rises in a straight line at first, and drops at the epochs of `schedule`.

    Args:
        config: the options of the run.
        epoch: epoch, counted from 0.
        step: step, counted from 0 over the whole run.
    """
    lr = config.lr * config.gamma ** sum(start <= epoch for start in config.schedule)
    if step >= config.warmup_steps:
        return lr
    return lr * (config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_steps)
