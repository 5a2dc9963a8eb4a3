"""What changes during a detector's training, as functions of how far it has come."""

from odconv.app.detect.config import DetectConfig


def learning_rate(config: DetectConfig, epoch: int, step: int) -> float:
    """Return the learning rate of a step, counted from 0: it rises at first, and drops at the epochs of `schedule`."""
    lr = config.lr * config.gamma ** sum(start <= epoch for start in config.schedule)
    if step >= config.warmup_steps:
        return lr
    return lr * (config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_steps)


def blend(config: DetectConfig, step: int, steps_per_epoch: int) -> float:
    """Return the blend of KernelWarehouse's layers at a step, counted from 1: it falls in a straight line to 0."""
    total = config.blend_epochs * steps_per_epoch
    return max(0, total - step) / max(1, total)
