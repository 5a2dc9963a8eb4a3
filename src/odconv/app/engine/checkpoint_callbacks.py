"""When a run writes which checkpoint."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from odconv.app.engine.checkpoint_io import BEST, LAST
from odconv.app.engine.loaders import SIGNALS

ASK = 8
"""Steps after which several processes ask each other whether one of them shall stop."""


class Best(ModelCheckpoint):
    """The best by a metric; goes on with the best score so far in whatever folder the run now is.

    More is better. Lightning goes on with it in the same folder alone.
    """

    def __init__(self, out: Path, monitor: str) -> None:
        super().__init__(
            out, Path(BEST).stem, monitor=monitor, mode="max", enable_version_counter=False,
            save_on_train_epoch_end=True,
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        folder = Path(self.dirpath or "")
        if (folder / BEST).exists():
            here = {name: str(folder / Path(name).name) for name in state_dict["best_k_models"]}
            paths = ("best_model_path", "kth_best_model_path", "last_model_path")
            state_dict = {
                **state_dict,
                **{name: state_dict[name] and str(folder / Path(state_dict[name]).name) for name in paths},
                "best_k_models": {here[name]: score for name, score in state_dict["best_k_models"].items()},
                "dirpath": self.dirpath,
            }
        super().load_state_dict(state_dict)


class Last(Checkpoint):
    """The last state: after every epoch, after every so many steps, and when one of SIGNALS tells the run to end."""

    def __init__(self, out: Path, every: int | None) -> None:
        self.path, self.every, self.stop = out / LAST, every, False
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen in place of Lightning, which does not save, or in mid-step, and whose processes may part ways."""
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time to, and end where it was told to."""
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # the end of the epoch is near, or the step is not done
        step = trainer.global_step
        stop = (trainer.world_size == 1 or step % ASK == 0) and self._shall_stop(trainer)
        if stop or (self.every and step % self.every == 0):
            trainer.save_checkpoint(self.path)
        if stop:
            raise SystemExit(128 + signal.SIGTERM)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, and end where it was told to."""
        trainer.save_checkpoint(self.path)
        if self._shall_stop(trainer):
            raise SystemExit(128 + signal.SIGTERM)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen no longer."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stop = True

    def _shall_stop(self, trainer: pl.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.stop, all=False)
