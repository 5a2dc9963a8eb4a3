"""What changes during training, as functions of how far it has come: nothing here needs to be saved and restored."""

from math import cos, pi

from odconv.app.classify.config import TrainConfig


def warmup(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the share of the learning rate that a step has, counted from 1 over the whole run; 1 after the warm-up."""
    return min(1.0, step / max(1.0, config.warmup_epochs * steps_per_epoch))


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 0; it stays the same within the epoch."""
    if config.lr_decay == "cos":
        return config.lr_min + (config.lr - config.lr_min) * (1 + cos(pi * epoch / config.epochs)) / 2
    drops = epoch // config.step if config.lr_decay == "step" else sum(start <= epoch for start in config.schedule)
    return config.lr * config.gamma**drops


def temperature(config: TrainConfig, step: int, steps_per_epoch: int) -> float | None:
    """Return the temperature of the dynamic layers: it falls in a straight line and is 1 after `temp_epoch` epochs.

    Without such epochs it is None, and stays what the network has: 1, or what a warm start or a checkpoint has brought.
    Steps are counted from 1 over the whole run; evaluation after a step keeps its temperature. ODConv: Li, Zhou, Yao,
    ICLR 2022, section 3.3.
    """
    return 1 + (config.temp_init - 1) * blend(config, step, steps_per_epoch) if config.temp_epoch else None


def blend(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the blend of KernelWarehouse's layers, which falls likewise, to 0: Li, Yao, ICML 2024, section 3.3."""
    total = config.temp_epoch * steps_per_epoch
    return max(0, total - step) / max(1, total)
