"""A running average of the weights."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging

from odconv.layers import set_temperature


class Average(EMAWeightAveraging):
    """Evaluates and keeps an exponential running average of weights and batch statistics.

    The temperature is not averaged: it is that of the step.

    Args:
        decay: the part of the average that a step keeps.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the average in place of the weights."""
        if self._average_model is not None:
            set_temperature(self._average_model, float(pl_module.temperature))  # type: ignore[arg-type]
        super().on_validation_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in place of the weights."""
        super().on_train_end(trainer, pl_module)
        set_temperature(pl_module, float(pl_module.temperature))  # type: ignore[arg-type]
