"""Small, real training runs for the tests that need one."""

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import tiny
import torch
from PIL import Image
from torch import nn

from odconv import ODConv2d
from odconv.app.classify import TrainConfig
from odconv.app.classify.module import ClassifierTraining
from odconv.app.data import Images, evaluation_transform
from odconv.app.engine.loaders import evaluation_loader, training_loader
from odconv.app.engine.trainer import make_trainer

COMMAND = [
    sys.executable,
    "-c",
    "import signal, sys, tiny; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from odconv.app.cli import main; sys.exit(main(sys.argv[1:]))",
]
"""Starts odconv listening to Ctrl-C even where the tests run as a background job, which ignores it."""

OPTIONS = {
    "arch": tiny.DYNAMIC,
    "stem": "small",
    "image_size": 16,
    "resize_size": 16,
    "augment": "small",
    "batch_size": 8,
    "test_batch": 8,
    "lr": 0.003,
    "lr_decay": "cos",
    "epochs": 1,
    "temp_epoch": 2,
    "workers": 0,
}
RANDOM = {"epochs": 3, "dropout": 0.2, "workers": 2, "augment": "imagenet"}
AGAIN = OPTIONS | RANDOM | {"workers": 0}


def make_folder(root: Path, per_class: dict[str, int], classes: tuple[str, ...] = ("bar", "dot", "gap")) -> Path:
    """Folders of images of 20 x 16 coarse noise, where each class has more of another colour."""
    random = np.random.default_rng(0)
    for split, count in per_class.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 160, (4, 5, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
                pixels[..., label] += 95
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def rows(out: Path) -> list[dict[str, float]]:
    with (out / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def without_times(table: list[dict[str, float]]) -> list[dict[str, float]]:
    times = {"train_seconds", "val_seconds", "images_per_second", "data_wait"}
    return [{name: value for name, value in row.items() if name not in times} for row in table]


def checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint(path)["state_dict"]


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def start(options: dict, launcher: tuple[str, ...] = (), command: tuple[str, ...] = ("train",)) -> subprocess.Popen:
    """Train in a process of its own, or in those of a launcher; or run another command."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    words = [sys.executable, *(("-m", *launcher) if launcher else ()), "-m", "tiny", *command, *flags]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_until(holds: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait for something to hold while a process runs."""
    deadline = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None:
            raise AssertionError(f"it ended too early: {process.communicate()[0]}")
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.005)


def children(pid: int) -> Iterator[int]:
    """Yield the ids of the processes that a process has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if parent == pid:
            yield int(folder.name)


class Tiny(nn.Sequential):
    """A dynamic network without batch norm, so that it does not matter how a batch is split."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            ODConv2d(8, 8, 3, kernel_num=2, norm="none"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )


class Watch(pl.Callback):
    """Notes what was in force in every step and evaluation."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.evaluations: list[float] = []
        self.losses: list[float] = []
        self.weights: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.steps.append((optimizer.param_groups[0]["lr"], pl_module.model[2].attention.temperature.item()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(pl_module.all_gather(outputs["loss"]).mean().item())

    def on_validation_end(self, trainer, pl_module) -> None:
        self.evaluations.append(pl_module.model[2].attention.temperature.item())


def noise_images(count: int, seed: int) -> Images:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
    return Images(pixels, random.integers(0, 4, count).tolist(), evaluation_transform(8, 8), 8)


def fit_tiny(count: int = 32, **options) -> tuple[Watch, dict[str, float]]:
    """Train the tiny network on so many images, 8 a step; evaluate it on 37."""
    config = TrainConfig(arch="tiny", data="", out="", **{"epochs": 2, "batch_size": 8, "lr": 0.1} | options)
    torch.manual_seed(0)
    watch = Watch()
    trainer = make_trainer(
        config.devices, "none", [watch], max_epochs=config.epochs, logger=False, enable_checkpointing=False,
        accumulate_grad_batches=config.accumulate, gradient_clip_val=config.clip,
    )  # fmt: skip
    place = {"rank": trainer.global_rank, "world_size": trainer.world_size}
    module = ClassifierTraining(Tiny(), config, list("abcd"))
    trainer.fit(
        module,
        training_loader(noise_images(count, 0), config.batch_size // config.accumulate, 0, **place),
        evaluation_loader(noise_images(37, 1), 10, 0, **place),
    )
    watch.weights = {name: tensor.detach().clone() for name, tensor in module.model.state_dict().items()}
    # `loss` is that of the last batch of this process
    return watch, {
        name: value.item() for name, value in trainer.callback_metrics.items() if name not in ("loss", "wait")
    }


def fit_as_one_of_two(rank: int, port: int, path: Path) -> None:
    """Train the tiny network as one of two processes of torchrun; the first writes what came out."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    watch, metrics = fit_tiny()
    if rank == 0:
        result = {"processes": torch.distributed.get_world_size(), "losses": watch.losses, "metrics": metrics}
        path.write_text(json.dumps(result))
