"""The history of a run: one line per epoch on the screen, and a table in the run's folder."""

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from odconv.system.files import write_table

Row = dict[str, float]
"""An epoch: `epoch` counts from 1; `temperature` is that of the last step, or `blend` of KernelWarehouse's networks."""


class History(pl.Callback):
    """Print one line per epoch and keep metrics.csv, which has one row per epoch; a resumed run goes on with both."""

    def __init__(self, out: Path) -> None:
        self.path = out / "metrics.csv"
        self.rows: list[Row] = []
        self.before = (0.0, 0.0)  # seconds of this epoch, and waited, before the run was broken off

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"rows": self.rows, "clocks": self._clocks()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rows = state_dict["rows"]
        self.before = state_dict.get("clocks", (0.0, 0.0))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks; a resumed run may be in the middle of an epoch."""
        self.loader: Any = trainer.train_dataloader
        self._start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clocks anew."""
        self.before = (0.0, 0.0)
        self._start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Show how much of the time is spent waiting for images."""
        seconds, waited = self._clocks()
        pl_module.log("wait", waited / seconds, prog_bar=True, logger=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the clocks."""
        self.trained, self.waited = self._clocks()
        self.validation = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's row."""
        loader: Any = trainer.val_dataloaders
        module: Any = pl_module
        held = {"temperature": float(module.temperature)} if module.blend is None else {"blend": module.blend}
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        images = trainer.num_training_batches * self.loader.batch_size
        evaluated = int(trainer.num_val_batches[0]) * loader.batch_size * trainer.world_size
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "steps": trainer.global_step,
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
                **held,
                "train_loss": metrics["train_loss"] / max(1, metrics["train_images"]),
                **self.scores(metrics),
                "train_corrupt": int(metrics["train_corrupt"]),
                "val_corrupt": min(len(loader.dataset), evaluated) - int(metrics["val_images"]),
                "train_seconds": self.trained,
                "val_seconds": time.perf_counter() - self.validation,
                "images_per_second": min(len(self.loader.sampler), images) * trainer.world_size / self.trained,
                "data_wait": self.waited / self.trained,
            }
        )
        for logger in trainer.loggers:
            logger.log_metrics(self.rows[-1], trainer.global_step)
        if trainer.is_global_zero:
            write_table(self.path, list(self.rows[-1]), self.rows)
            say = getattr(trainer.progress_bar_callback, "print", print)  # above a bar, not into it
            say(self._line(trainer.max_epochs or 0))

    def scores(self, metrics: Mapping[str, float]) -> Row:
        """Return an epoch's scores, by column, from what was logged."""
        raise NotImplementedError

    def describe(self, row: Row) -> str:
        """Return the scores of a row in words."""
        raise NotImplementedError

    def _start(self) -> None:
        self.start, self.loader.waited = time.perf_counter(), 0.0

    def _clocks(self) -> tuple[float, float]:
        """Return the seconds of this epoch so far, and those of them spent waiting for images."""
        seconds, waited = self.before
        return seconds + time.perf_counter() - self.start, waited + self.loader.waited

    def _line(self, epochs: int) -> str:
        row = self.rows[-1]
        seconds = row["train_seconds"] + row["val_seconds"]
        left = timedelta(seconds=round(seconds * (epochs - int(row["epoch"]))))
        corrupt = [
            f"   {row[f'{split}_corrupt']} corrupt {split} images"
            for split in ("train", "val")
            if row[f"{split}_corrupt"]
        ]
        return (
            f"epoch {row['epoch']:3}/{epochs}   loss {row['train_loss']:.4f}   {self.describe(row)}   "
            f"{seconds:.1f} s, {100 * row['data_wait']:.0f} % waiting   {left} left" + "".join(corrupt)
        )
