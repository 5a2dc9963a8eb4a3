"""Lightning's Trainer, set up alike for training and evaluation."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
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

from odconv.app.engine.checkpoint_callbacks import Best, Last
from odconv.app.engine.checkpoint_io import CheckpointFiles
from odconv.app.engine.config import Amp, RunConfig
from odconv.app.engine.loggers import make_loggers
from odconv.app.engine.trace import Trace

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
