"""A network in evaluation and in training, as Lightning's Trainer wants it."""

import time
from collections.abc import Mapping

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric
from torchvision.transforms import v2

from odconv.app.classify.config import TrainConfig
from odconv.app.classify.schedule import blend, learning_rate, temperature, warmup
from odconv.app.data import IGNORE, normalise
from odconv.app.engine.history import History, Row
from odconv.app.engine.training_module import Pace, TrainingModule

Batch = tuple[Tensor, Tensor]
"""Images (B, 3, H, W) and labels (B); IGNORE marks what must not count."""


class ClassifierEvaluation(pl.LightningModule):
    """Measures a classifier: logs val_loss, val_top1 and val_top5 (in %), and val_images, how many images counted.

    Afterwards, `seconds` is how long the evaluation took. It is a ValueError if no image could be read.

    All are exact over several processes: what pads a batch, or cannot be read, does not count.
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


class ClassifierTraining(TrainingModule, ClassifierEvaluation):
    """Trains a classifier on the cross-entropy, with the schedules of :mod:`odconv.app.classify.schedule`."""

    config: TrainConfig

    def __init__(self, model: nn.Module, config: TrainConfig, classes: list[str]) -> None:
        *_, last = model.parameters()  # of the classifier
        super().__init__(model, config, {"classes": classes}, last)
        self.hold(None, 0.0)
        self.erase = v2.RandomErasing(config.erasing, value="random") if config.erasing else None
        self.mix = mixup_or_cutmix(config, config.num_classes or len(classes))
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if config.compile:
            model.compile()

    def schedule(self) -> Pace:
        """Return the pace of the step that comes next."""
        config, step, steps = self.config, self.global_step + 1, self.steps_per_epoch()
        rate = learning_rate(config, self.current_epoch) * warmup(config, step, steps)
        return rate, temperature(config, step, steps), blend(config, step, steps)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Leave unreadable images out of training, so that their blanks do not count in batch norm either."""
        if not self.trainer.training:
            return batch
        images, labels = batch
        readable = labels != IGNORE
        self.count_readable(readable)
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
        if self.erase is not None:
            images = torch.stack([self.erase(image) for image in images])
        if self.mix is not None and count == len(labels):
            images, labels = self.mix(images, labels)  # now a distribution over the classes for each image
        total = F.cross_entropy(
            self.model(images),
            labels,
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=self.config.label_smoothing,
        )
        return self.weigh(total / count.clamp(min=1), count, batch_idx)


class AccuracyHistory(History):
    """Keep the history of a classifier: top1 and top5 are in %."""

    def scores(self, metrics: Mapping[str, float]) -> Row:
        """Return an epoch's scores, by column, from what was logged."""
        return {
            "val_loss": metrics["val_loss"],
            "top1": round(metrics["val_top1"], 4),
            "top5": round(metrics["val_top5"], 4),
        }

    def describe(self, row: Row) -> str:
        """Return the scores of a row in words."""
        return f"val loss {row['val_loss']:.4f}   top-1 {row['top1']:6.2f} %   top-5 {row['top5']:6.2f} %"


def mixup_or_cutmix(config: TrainConfig, classes: int) -> v2.Transform | None:
    """Return what mixes the images of a batch, drawing one way for each batch where there are two; None for none."""
    ways = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
    chosen = [way(alpha=alpha, num_classes=classes) for way, alpha in ways if alpha > 0]
    return v2.RandomChoice(chosen) if chosen else None


def _mean() -> MeanMetric:
    return MeanMetric(nan_strategy="disable")  # a loss that is not a number shall be seen
