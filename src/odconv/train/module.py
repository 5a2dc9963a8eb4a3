"""A network in evaluation and in training, as Lightning's Trainer wants it."""

import time
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from odconv.data import IGNORE
from odconv.layers import set_temperature
from odconv.train.config import TrainConfig
from odconv.train.schedule import learning_rate, temperature

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, H, W) and labels (B); IGNORE marks what must not count."""


class Evaluation(pl.LightningModule):
    """Measures a classifier: logs val_loss, val_top1 and val_top5 (in %), and val_images, how many images counted.

    Afterwards, `seconds` is how long the evaluation took. It is a ValueError if no image could be read.

    All are exact over several processes: what pads a batch, or cannot be read, does not count.

    Args:
        model: from images (B, 3, H, W) to logits (B, classes).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.val_loss, self.val_top1, self.val_top5 = _mean(), _mean(), _mean()
        self.val_images = SumMetric()
        self.seconds = 0.0

    def on_validation_start(self) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def validation_step(self, batch: Batch, _: int) -> None:
        """Measure a batch."""
        images, labels = batch
        logits, labels = self.model(images)[labels != IGNORE].float(), labels[labels != IGNORE]
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        self.val_loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.val_top1.update(100.0 * hits[:, 0])
        self.val_top5.update(100.0 * hits.any(dim=1))
        self.val_images.update(len(labels))
        metrics = {name: getattr(self, name) for name in ("val_loss", "val_top1", "val_top5", "val_images")}
        self.log_dict(metrics, on_step=False, on_epoch=True, logger=False)  # History logs them

    def on_validation_epoch_end(self) -> None:
        """See that there is a result, before anything is chosen by it, and read the clock."""
        if self.val_images.compute() == 0:
            raise ValueError("none of the images for evaluation can be read")
        self.seconds = time.perf_counter() - self.start


class Training(Evaluation):
    """Trains a classifier by SGD on the cross-entropy, with the schedules of :mod:`odconv.train.schedule`.

    Its checkpoints hold what is needed to build the network again: the options, the classes, the temperature.

    Args:
        model: from images (B, 3, H, W) to logits (B, classes).
        config: the options of the run.
        classes: names of the classes.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, classes: list[str]) -> None:
        super().__init__(model)
        self.config, self.classes, self.temperature = config, classes, 1.0
        set_temperature(model, self.temperature)  # weights to start from may have brought another
        self.save_hyperparameters(asdict(config))
        self.train_loss, self.train_corrupt = _mean(), SumMetric()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with weight decay on every parameter, as published."""
        config = self.config
        return torch.optim.SGD(self.model.parameters(), config.lr, config.momentum, weight_decay=config.wd)

    def on_train_epoch_start(self) -> None:
        """Set the learning rate, and seed dropout and the like by the epoch, so that resuming is exact."""
        lr = learning_rate(self.config, self.current_epoch)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = lr
        torch.manual_seed(hash((self.config.seed, self.current_epoch, self.global_rank)))

    def on_train_batch_start(self, _batch: Batch, _batch_idx: int) -> None:
        """Set the temperature."""
        value = temperature(self.config, self.global_step + 1, int(self.trainer.num_training_batches))
        if value != self.temperature:
            set_temperature(self.model, value)
            self.temperature = value

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Leave unreadable images out of training, so that their blanks do not count in batch norm either."""
        if not self.trainer.training:
            return batch
        images, labels = batch
        readable = labels != IGNORE
        self.train_corrupt.update(int((~readable).sum()))
        if readable.all():
            return batch
        # batch norm needs two images, if need be blank ones, which do not count in the loss
        kept = (~readable).byte().argsort(stable=True)[: max(2, int(readable.sum()))]
        return images[kept], labels[kept]

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Return the mean loss of the images that count; 0 where none does."""
        images, labels = batch
        count = (labels != IGNORE).sum()
        loss = F.cross_entropy(self.model(images), labels, ignore_index=IGNORE, reduction="sum") / count.clamp(min=1)
        self.train_loss.update(loss.detach(), count)
        self.log("loss", loss, prog_bar=True)
        metrics = {"train_loss": self.train_loss, "train_corrupt": self.train_corrupt}
        self.log_dict(metrics, on_step=False, on_epoch=True, logger=False)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the options do not say."""
        checkpoint["odconv"] = {"classes": self.classes, "temperature": self.temperature}


def _mean() -> MeanMetric:
    return MeanMetric(nan_strategy="disable")  # a loss that is not a number shall be seen
