"""The statistics of the attentions over a training run."""

from math import isfinite
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from odconv.attentions.statistics import COLUMNS, attention_statistics
from odconv.system.files import write_table

IMAGES = 32


class AttentionStatistics(pl.Callback):
    """Keeps attentions.csv: in every evaluation, :func:`attention_statistics` of the module's `model` on 32 images.

    The images are some of the first evaluation, evenly spread over its batches, so that nothing is read twice and no
    random state changes. A resumed run goes on with the table. Static networks get none.

    A callback that evaluates other weights than those in training must come later in the Trainer's list.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / "attentions.csv"
        self.rows: list[dict[str, Any]] = []
        self.kept: list[Tensor] = []
        self.images: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rows = state_dict["rows"]

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep some images of the first evaluation."""
        if self.images is None and trainer.is_global_zero:
            batches = trainer.num_val_batches[dataloader_idx]
            batches = int(batches) if isfinite(batches) else IMAGES
            due = min(IMAGES, (batch_idx + 1) * IMAGES // batches) - len(self.kept)
            images, labels = batch
            images = images[labels >= 0]  # the others are blanks
            self.kept += images[:: max(1, len(images) // max(1, due))][:due].clone()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Add the epoch's rows, of the weights that are being evaluated."""
        if self.images is None and self.kept:  # those of the first evaluation are those of all
            self.images = torch.stack(self.kept)
        if self.images is None:
            return
        statistics = attention_statistics(pl_module.model, self.images)
        self.rows += [{"epoch": trainer.current_epoch + 1, **row} for row in statistics]
        if self.rows:
            write_table(self.path, ["epoch", *COLUMNS], self.rows)
