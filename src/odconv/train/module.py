"""A network in evaluation and in training, as Lightning's Trainer wants it."""

import math
import time
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MeanMetric, SumMetric

from odconv.data import IGNORE, normalise
from odconv.layers import set_temperature
from odconv.train.config import TrainConfig
from odconv.train.schedule import learning_rate, temperature

COMPRESSION = {"bf16": bf16_compress_hook, "fp16": fp16_compress_hook}

SUMS = ("train_loss", "train_images", "train_corrupt")
"""Metrics of a training epoch: the summed loss, the images that count, those that cannot be read."""

ADVICE = "the checkpoints are from before. A lower lr, a higher temp_epoch or clip may help"

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

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise the images."""
        images, labels = batch
        return normalise(images), labels

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

    All that is random in a step is seeded by the step, and the schedules are functions of it, so that a run that goes
    on from a checkpoint does what it would have done. The checkpoints hold what is needed to build the network again:
    the options, the classes, the temperature.

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
        # sums, since a mean that does not hide NaN ignores weights (torchmetrics 1.9)
        self.train_loss = SumMetric(nan_strategy="disable")
        self.train_images, self.train_corrupt = SumMetric(), SumMetric()
        self.bad_steps = torch.zeros((), dtype=torch.int64)  # in a row, on the device of the gradients
        self.blank_batches = 0  # in a row
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if config.compile:
            model.compile()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with weight decay on every parameter, as published."""
        config = self.config
        return torch.optim.SGD(self.model.parameters(), config.lr, config.momentum, weight_decay=config.wd)

    def on_train_start(self) -> None:
        """Have gradients compressed between processes."""
        wrapped = self.trainer.strategy.model
        if self.config.compress != "none" and isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, COMPRESSION[self.config.compress])

    def on_train_batch_start(self, _batch: Batch, batch_idx: int) -> None:
        """Set the learning rate, the temperature, and the seed of dropout and the like."""
        lr = learning_rate(self.config, self.current_epoch)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = lr
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.config.accumulate)
        value = temperature(self.config, self.global_step + 1, steps_per_epoch)
        if value != self.temperature:
            set_temperature(self.model, value)
            self.temperature = value
        torch.manual_seed(hash((self.config.seed, self.current_epoch, batch_idx, self.global_rank)))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Leave unreadable images out of training, so that their blanks do not count in batch norm either."""
        if not self.trainer.training:
            return batch
        images, labels = batch
        readable = labels != IGNORE
        self.train_corrupt.update(int((~readable).sum()))
        self.blank_batches = 0 if readable.any() else self.blank_batches + 1
        if self.blank_batches >= self.config.nan_steps * self.config.accumulate:
            raise OSError(f"none of the images of the last {self.blank_batches} batches can be read")
        if readable.all():
            return batch
        # batch norm needs two images, if need be blank ones, which do not count in the loss
        kept = (~readable).byte().argsort(stable=True)[: max(2, int(readable.sum()))]
        return images[kept], labels[kept]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalise the images and lay them out as the network is."""
        images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images, labels

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the images that count; 0 where none does."""
        images, labels = batch
        count = (labels != IGNORE).sum()
        total = F.cross_entropy(self.model(images), labels, ignore_index=IGNORE, reduction="sum")
        loss = total / count.clamp(min=1)
        self.train_loss.update(total.detach())
        self.train_images.update(count)
        self.log("loss", loss, prog_bar=True)
        metrics = {name: getattr(self, name) for name in SUMS}
        self.log_dict(metrics, on_step=False, on_epoch=True, logger=False)
        return loss * self._weight(batch_idx) if self.config.accumulate > 1 else loss

    def _weight(self, batch_idx: int) -> float:
        """Return how much a batch counts among those of its step: at the end of an epoch they are fewer, and smaller.

        Lightning divides each loss by `accumulate`.
        """
        loader: Any = self.trainer.train_dataloader
        batches, size, accumulate = len(loader), loader.batch_size, self.config.accumulate
        images = min(len(loader.sampler), batches * size)
        first = batch_idx - batch_idx % accumulate
        in_step = min(images, (first + accumulate) * size) - first * size
        return accumulate * min(size, images - batch_idx * size) / in_step

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the steps in a row that have gone wrong, and give up after `nan_steps`.

        The classifier's gradient is not finite where the loss is not, and it is the same in all processes.
        """
        *_, last = self.model.parameters()
        if last.grad is not None:
            self.bad_steps = (self.bad_steps.to(last.grad.device) + 1) * ~last.grad.isfinite().all()
        step, most = self.global_step + 1, self.config.nan_steps
        look = self.bad_steps.device.type == "cpu" or step % most == 0  # which is to wait for a GPU
        if look and (bad := int(self.bad_steps)) >= most:
            raise FloatingPointError(f"the loss is not a number, or infinite, since step {step - bad + 1}; {ADVICE}")

    def on_train_epoch_end(self) -> None:
        """See that the epoch was not empty, before it is saved."""
        if self.train_images.compute() == 0:
            raise OSError("none of the images for training can be read")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the options do not say, and see that the weights are not lost."""
        tensors = self.model.state_dict().values()
        if not all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()):
            since = f"step {self.global_step - max(0, int(self.bad_steps) - 1)}"
            raise FloatingPointError(f"weights are not finite, since {since} or a little before; {ADVICE}")
        batch = 0 if self.trainer.is_last_batch else self.trainer.fit_loop.epoch_loop.batch_idx + 1
        checkpoint["odconv"] = {
            "classes": self.classes,
            "temperature": self.temperature,
            "batch": batch,  # of the epoch, that is next
            "processes": self.trainer.world_size,
            "so_far": {name: self._total(getattr(self, name)) for name in SUMS} if batch else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the means of an epoch that was broken off."""
        so_far = checkpoint["odconv"].get("so_far")
        if so_far and self.global_rank == 0:  # they are those of all processes
            for name, total in so_far.items():
                getattr(self, name).sum_value = total

    @staticmethod
    def _total(metric: SumMetric) -> Tensor:
        """Return the sum over all processes."""
        with metric.sync_context():
            return metric.sum_value.clone()


def _mean() -> MeanMetric:
    return MeanMetric(nan_strategy="disable")  # a loss that is not a number shall be seen
