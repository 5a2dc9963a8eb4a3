"""A detector in evaluation and in training, as Lightning's Trainer wants it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import SumMetric

from odconv.app.detect.coco import Annotations
from odconv.app.detect.config import DetectConfig
from odconv.app.detect.images import UNREADABLE, Target
from odconv.app.detect.schedule import blend, learning_rate
from odconv.app.detect.scores import METRICS, Result, describe_detections, score
from odconv.app.engine.history import History, Row
from odconv.app.engine.training_module import Pace, TrainingModule

Batch = tuple[Sequence[Tensor], Sequence[Target]]
"""Images (3, H, W), each of its size, and what is on them."""


class DetectorEvaluation(pl.LightningModule):
    """Measures a detector: logs val_ap, val_mask_ap and the like (in %), and val_images, how many images counted.

    Afterwards, `scores` are those of :func:`odconv.app.detect.scores.score`, `results` what was found, in COCO's
    format, and `seconds` how long it took. It is a ValueError if no image could be read.

    All are exact over several processes: every image is looked at once, and one process scores what all have found.
    """

    annotations: Annotations
    """What is on the images that are looked at."""
    categories: Sequence[int | None]
    """The category id of each class, that of label 1 first; None for one that does not count."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.masks = hasattr(model, "roi_heads") and model.roi_heads.has_mask()
        self.val_images = SumMetric()
        self.scores: dict[str, Any] = {}
        self.results: list[Result] = []
        self.looked_at: list[Any] = []
        self.seconds = 0.0

    def on_validation_start(self) -> None:
        """Start the clock."""
        self.start = time.perf_counter()
        self.results, self.looked_at = [], []

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Make images of bytes, scaled to 0 .. 1."""
        images, targets = batch
        return [image.float() / 255 for image in images], targets

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Note what is found on a batch."""
        readable = [pair for pair in zip(*batch, strict=True) if pair[1]["index"] != UNREADABLE]
        found = self.model([image for image, _ in readable]) if readable else []
        for (_, target), detections in zip(readable, found, strict=True):
            image_id = self.annotations.images[int(target["index"])]["id"]
            self.looked_at.append(image_id)
            self.results += describe_detections(detections, image_id, self.categories)
        self.val_images.update(float(len(readable)))
        self.log("val_images", self.val_images, on_step=False, on_epoch=True, logger=False)

    def on_validation_epoch_end(self) -> None:
        """Score what all processes have found."""
        shares: list[Any] = [None] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(shares, (self.looked_at, self.results))
        else:
            shares = [(self.looked_at, self.results)]
        looked_at = [image_id for ids, _ in shares for image_id in ids]
        if not looked_at:
            raise ValueError("none of the images for evaluation can be read")
        self.results = [result for _, results in shares for result in results]
        scores = score(self.annotations, self.results, looked_at, self.masks) if self.trainer.is_global_zero else {}
        self.scores = self.trainer.strategy.broadcast(scores)
        if self.scores["ap"] is None:
            raise ValueError("none of the images for evaluation that can be read has an object to find")
        values = {f"val_{name}": value for name, value in self.scores.items() if isinstance(value, float)}
        self.log_dict(values, logger=False)
        self.seconds = time.perf_counter() - self.start


class DetectorTraining(TrainingModule, DetectorEvaluation):
    """Trains a detector on the sum of its losses; the annotations are those for evaluation, and say the classes."""

    config: DetectConfig

    def __init__(self, model: Any, config: DetectConfig, annotations: Annotations) -> None:
        categories = [item["id"] for item in annotations.categories]
        notes = {"classes": annotations.classes, "categories": categories}
        # all losses reach the pyramid's coarsest level
        super().__init__(model, config, notes, model.backbone.fpn.inner_blocks[-1][-1].weight)
        self.annotations, self.categories = annotations, categories
        self.hold(config.temperature, 0.0)

    def schedule(self) -> Pace:
        """Return the pace of the step that comes next."""
        config, step = self.config, self.global_step
        rate = learning_rate(config, self.current_epoch, step)
        return rate, config.temperature, blend(config, step + 1, self.steps_per_epoch())

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Leave unreadable images out of training; if there is none left, one stays that will not count."""
        if not self.trainer.training:
            return batch
        images, targets = batch
        readable = torch.tensor([target["index"] != UNREADABLE for target in targets])
        self.count_readable(readable)
        kept = torch.where(readable)[0].tolist() or [0]
        return [images[i] for i in kept], [targets[i] for i in kept]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the losses; 0 where no image counts."""
        images, targets = batch
        losses = self.model(images, targets)
        counts = targets[0]["index"] != UNREADABLE
        self.log_dict(losses)
        total: Tensor = sum(losses.values())
        return self.weigh(total * counts, counts * len(images), batch_idx)


class DetectionHistory(History):
    """Keep the history of a detector: all scores are in %, nan where nothing of a size is there to be found."""

    def scores(self, metrics: Mapping[str, float]) -> Row:
        """Return an epoch's scores, by column, from what was logged."""
        columns = [*METRICS, *(f"mask_{name}" for name in METRICS if "val_mask_ap" in metrics)]
        return {name: round(metrics.get(f"val_{name}", float("nan")), 4) for name in columns}

    def describe(self, row: Row) -> str:
        """Return the scores of a row in words."""
        mask = f"   mask AP {row['mask_ap']:5.2f}" if "mask_ap" in row else ""
        return f"AP {row['ap']:5.2f}   AP50 {row['ap50']:5.2f}{mask}"
