"""The course of a run: a line an epoch on the screen, and a table in the run's folder."""

import csv
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from odconv.files import replacing

Row = dict[str, float]
"""An epoch: `epoch` counts from 1, top1 and top5 are in %, `temperature` is that of the last step."""


class History(pl.Callback):
    """Prints a line an epoch and keeps metrics.csv, which has a row an epoch; a resumed run goes on with both.

    Args:
        out: folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / "metrics.csv"
        self.rows: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.rows = state_dict["rows"]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the clock."""
        self.trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's row."""
        loader: Any = trainer.val_dataloaders
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "lr": trainer.optimizers[0].param_groups[0]["lr"],
                "temperature": float(pl_module.temperature),  # type: ignore[arg-type]
                "train_loss": metrics["train_loss"],
                "val_loss": metrics["val_loss"],
                "top1": round(metrics["val_top1"], 4),
                "top5": round(metrics["val_top5"], 4),
                "train_corrupt": int(metrics["train_corrupt"]),
                "val_corrupt": len(loader.dataset) - int(metrics["val_images"]),
                "train_seconds": self.trained - self.start,
                "val_seconds": time.perf_counter() - self.trained,
            }
        )
        for logger in trainer.loggers:
            logger.log_metrics(self.rows[-1], trainer.global_step)
        if trainer.is_global_zero:
            self._write()
            say = getattr(trainer.progress_bar_callback, "print", print)  # above a bar, not into it
            say(self._line(trainer.max_epochs or 0))

    def _write(self) -> None:
        with replacing(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)

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
            f"epoch {row['epoch']:3}/{epochs}   loss {row['train_loss']:.4f}   val loss {row['val_loss']:.4f}   "
            f"top-1 {row['top1']:6.2f} %   top-5 {row['top5']:6.2f} %   {seconds:.1f} s   {left} left"
            + "".join(corrupt)
        )
