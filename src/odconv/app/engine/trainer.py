"""Lightning's Trainer, set up alike for training and evaluation, and its errors in plain words."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import DistError
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

from odconv.app.engine.checkpoint_callbacks import Best, Last
from odconv.app.engine.checkpoint_io import CheckpointFiles
from odconv.app.engine.config import Amp, RunConfig
from odconv.app.engine.loggers import make_loggers

PRECISION: dict[Amp, Any] = {"none": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}

NOISE = (
    "Checkpoint directory .* exists and is not empty",
    "The '.*_dataloader' does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
    "This DataLoader will create .* worker processes in total",
    "Found .* module\\(s\\) in eval mode at the start of training",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)
"""Warnings that tell a user nothing to act on."""

LOST = ("gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe")
"""What errors say where other processes do not answer."""


def make_trainer(
    devices: int | Literal["auto"],
    amp: Amp,
    callbacks: Sequence[Callback] = (),
    timeout: float = 1800.0,
    **options: Any,
) -> pl.Trainer:
    """Set up a Trainer for the GPUs or CPU processes that are asked for, or that torchrun has started.

    A progress bar is added on a terminal; `timeout` is how long processes wait for each other, in seconds; `options`
    are further arguments of the Trainer. A ValueError if the machine has no such devices, or cannot do such precision.
    """
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    local, world = (int(os.environ.get(name, "0")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))  # set by torchrun
    terminal = sys.stdout.isatty()
    here = torch.cuda.device_count() if devices == "auto" else devices
    several = max(world, int(os.environ.get("SLURM_NTASKS", "1")), here) > 1
    if amp == "fp16" and not torch.cuda.is_available():
        raise ValueError("amp=fp16 works on GPUs alone, and there is none here; amp=bf16 works everywhere")
    # Lightning would put a job back into the queue with a checkpoint of its own, made in the middle of a step
    slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    strategy = DDPStrategy(timeout=timedelta(seconds=timeout), gradient_as_bucket_view=True) if several else "auto"
    try:
        return pl.Trainer(
            strategy=strategy,
            devices=local or devices,
            num_nodes=world // local if local else int(os.environ.get("SLURM_NNODES", "1")),
            precision=PRECISION[amp],
            callbacks=[*callbacks, *([TQDMProgressBar()] if terminal else [])],
            plugins=[CheckpointFiles(), *([SLURMEnvironment(auto_requeue=False)] if slurm else [])],
            use_distributed_sampler=False,  # ours resume and evaluate exactly
            num_sanity_val_steps=0,
            enable_model_summary=False,
            enable_progress_bar=terminal,
            **{"benchmark": True} | options,
        )
    except MisconfigurationException as error:
        raise ValueError(f"devices={devices} does not work here: {error}") from error


def make_training(config: RunConfig, monitor: str, callbacks: Sequence[Callback], **options: Any) -> pl.Trainer:
    """Set up the Trainer of a training run, with the callbacks that write its checkpoints, the best by `monitor`.

    `callbacks` act before the checkpoints are written. A ValueError if the batch cannot be shared out among processes.
    """
    out = Path(config.out)
    trainer = make_trainer(
        config.devices,
        config.amp,
        callbacks=[
            *callbacks,
            *([Trace(out / "trace")] if config.profile else []),
            *([EMAWeightAveraging(decay=config.average)] if config.average else []),
            # first: if the run is killed between the two, resuming repeats the epoch, and with it this one
            Best(out, monitor),
            Last(out, config.save_every),
        ],
        timeout=config.timeout,
        logger=make_loggers(config.logger, out),
        fast_dev_run=config.fast_dev_run or False,
        max_epochs=config.epochs,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip,
        **options,
    )
    parts = trainer.world_size * config.accumulate
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes x accumulate = {trainer.world_size} x "
            f"{config.accumulate}, got {config.batch_size}"
        )
    return trainer


class Trace(pl.Callback):
    """Writes a trace of the fifth to the ninth step to a folder, for chrome://tracing, Perfetto or TensorBoard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count the steps."""
        handler = tensorboard_trace_handler(str(self.folder), f"process{trainer.global_rank}")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        steps = schedule(wait=2, warmup=2, active=5, repeat=1)
        self.profiler = profile(activities=activities, schedule=steps, on_trace_ready=handler)
        self.profiler.start()

    def on_train_batch_end(self, *_: Any) -> None:
        """Count a step."""
        self.profiler.step()

    def on_train_end(self, *_: Any) -> None:
        """End, if there were fewer steps."""
        self.profiler.stop()


@contextmanager
def explained(processes: int) -> Iterator[None]:
    """Turn the errors of PyTorch and Lightning that have a cause outside of them into errors that name it.

    An OSError: other processes cannot be reached or were lost, or one that reads images was killed. A SystemExit after
    SIGTERM, of which Lightning would report success. A KeyboardInterrupt, which Lightning turns into an exit.
    """
    try:
        yield
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if text.startswith("DataLoader worker"):
            raise OSError(f"a process that reads images was killed; is there enough memory? ({text})") from error
        if processes > 1 and (isinstance(error, DistError) or any(word in text for word in LOST)):
            place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise OSError(
                f"the other processes cannot be reached or were lost; they meet at {place} ({text})"
            ) from error
        raise
