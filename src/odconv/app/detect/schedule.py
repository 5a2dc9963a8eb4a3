"""What changes during a detector's training, as functions of how far it has come."""

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


def blend(config: DetectConfig, step: int, steps_per_epoch: int) -> float:
    """Return the blend of KernelWarehouse's layers: it falls in a straight line and is 0 after `blend_epochs` epochs.

    Args:
        config: the options of the run.
        step: step, counted from 1 over the whole run.
        steps_per_epoch: training steps in an epoch.
    """
    total = config.blend_epochs * steps_per_epoch
    return max(0, total - step) / max(1, total)
