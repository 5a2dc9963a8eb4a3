"""A trace of a few training steps: what the processor and the GPU did, and when."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.profiler
from torch.profiler import ProfilerActivity


class Trace(pl.Callback):
    """Writes a trace of the fifth to the ninth step to a folder, for chrome://tracing, Perfetto or TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count the steps."""
        handler = torch.profiler.tensorboard_trace_handler(str(self.folder), f"process{trainer.global_rank}")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        schedule = torch.profiler.schedule(wait=2, warmup=2, active=5, repeat=1)
        self.profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=handler)
        self.profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        """Count a step."""
        self.profiler.step()

    def on_train_end(self, *_: Any) -> None:
        """End, if there were fewer steps."""
        self.profiler.stop()
