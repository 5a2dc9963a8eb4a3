"""What every training does, whatever is trained: schedules, seeds, and a stop before anything is lost."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import SumMetric

from odconv.app.engine.config import RunConfig
from odconv.layers import find_temperature, try_temperature
from odconv.layers.parameter_groups import parameter_groups
from odconv.layers.warehouse_attention import try_blend

COMPRESSION = {"bf16": bf16_compress_hook, "fp16": fp16_compress_hook}

SUMS = ("train_loss", "train_images", "train_corrupt")
"""Metrics of a training epoch: the summed loss, the images that count, those that cannot be read."""

ADVICE = "the checkpoints are from before. A lower lr, attention_lr or clip may help"


Pace = tuple[float, float | None, float]
"""What a step of training sets: the learning rate, and the temperature and blend of attentions that have one; a
temperature of None stays as it is."""


class TrainingModule(pl.LightningModule):
    """Trains a network by SGD, in steps that are functions of what is known beforehand.

    All that is random in a step is seeded by the step, and the schedules are functions of it, so that a run that goes
    on from a checkpoint does what it would have done. The checkpoints hold what is needed to build the network again:
    the options, the temperature, and what `notes` says of the data, such as its classes.

    To be mixed into a class that evaluates, which is made with the network alone and keeps it as `model`. What is left
    to say: the pace of a step, which images of a batch can be read, and the loss. The gradient of the `watched`
    parameter must not be finite where the loss is not.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, config: RunConfig, notes: Mapping[str, Any], watched: nn.Parameter) -> None:
        super().__init__(model)
        self.config, self.notes, self.temperature = config, notes, 1.0
        self.blend: float | None = None
        self.watched = (watched,)  # in a tuple, for it is registered already
        self.save_hyperparameters(asdict(config))
        # sums, since a mean that does not hide NaN ignores weights (torchmetrics 1.9)
        self.train_loss = SumMetric(nan_strategy="disable")
        self.train_images, self.train_corrupt = SumMetric(), SumMetric()
        self.bad_steps = torch.zeros((), dtype=torch.int64)  # in a row, on the device of the gradients
        self.blank_batches = 0  # in a row

    def schedule(self) -> Pace:
        """Return the pace of the step that comes next."""
        raise NotImplementedError

    def hold(self, temperature: float | None, blend: float) -> None:
        """Set the temperature and the blend of the network; the latter stays None where it has none."""
        if temperature is not None:
            try_temperature(self.model, temperature)
        self.temperature = temperature or find_temperature(self.model) or 1.0
        self.blend = blend if try_blend(self.model, blend) else None

    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps in an epoch."""
        return math.ceil(self.trainer.num_training_batches / self.config.accumulate)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; SGD has weight decay on every parameter, as published."""
        config = self.config
        groups = parameter_groups(
            self.model,
            lr=config.lr,
            weight_decay=config.wd,
            attention_lr=config.attention_lr,
            decay="all" if config.optimizer == "sgd" else "weights",
        )
        for group in groups:
            group["factor"] = group["lr"] / config.lr  # of the learning rate of a step
        if config.optimizer == "adamw":
            return torch.optim.AdamW(groups, config.lr)
        return torch.optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov)

    def on_train_start(self) -> None:
        """Set what attentions begin with; have gradients compressed between processes."""
        _, temperature, blend = self.schedule()
        self.hold(temperature, blend)
        wrapped = self.trainer.strategy.model
        if self.config.compress != "none" and isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, COMPRESSION[self.config.compress])

    def on_train_batch_start(self, _batch: Any, batch_idx: int) -> None:
        """Set the learning rate, temperature and blend, and the seed of dropout and the like."""
        lr, temperature, blend = self.schedule()
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = lr * group.get("factor", 1.0)  # version 0.1.0 saved none
        if temperature not in (None, self.temperature) or self.blend not in (None, blend):
            self.hold(temperature, blend)
        torch.manual_seed(hash((self.config.seed, self.current_epoch, batch_idx, self.global_rank)))

    def count_readable(self, readable: Tensor) -> None:
        """Note which images of a batch can be read, (B) of bool, and stop if none can for too long."""
        self.train_corrupt.update(int((~readable).sum()))
        self.blank_batches = 0 if readable.any() else self.blank_batches + 1
        if self.blank_batches >= self.config.nan_steps * self.config.accumulate:
            raise OSError(f"none of the images of the last {self.blank_batches} batches can be read")

    def weigh(self, loss: Tensor, count: Tensor, batch_idx: int) -> Tensor:
        """Log the mean loss of a batch over the images that count; return what to differentiate."""
        self.train_loss.update(loss.detach() * count)
        self.train_images.update(count)
        self.log("loss", loss, prog_bar=True)
        self.log_dict({name: getattr(self, name) for name in SUMS}, on_step=False, on_epoch=True, logger=False)
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

        The watched gradient is the same in all processes.
        """
        gradient = self.watched[0].grad
        if gradient is not None:
            self.bad_steps = (self.bad_steps.to(gradient.device) + 1) * ~gradient.isfinite().all()
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
            **self.notes,
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
