"""A training run: everything is checked and put together first, then Lightning's Trainer works."""

import json
import signal
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from odconv.checkpoints import read_state_dict
from odconv.data import open_data
from odconv.models import create_model
from odconv.train.config import TrainConfig
from odconv.train.files import CheckpointFiles, replacing
from odconv.train.history import History, Row
from odconv.train.loaders import evaluation_loader, training_loader
from odconv.train.module import Training
from odconv.train.trainer import make_trainer

NETWORK_OPTIONS = ("arch", "kernel_num", "reduction", "num_classes", "stem")


def run(config: TrainConfig) -> dict[str, Any]:
    """Train a network; see :func:`odconv.train.train`."""
    out, history = Path(config.out), History(Path(config.out))
    trainer = make_trainer(
        config.devices,
        config.amp,
        callbacks=[history, *_checkpoints(out)],
        logger=TensorBoardLogger(out / "tensorboard", name="", version="", default_hp_metric=False),
        max_epochs=config.epochs,
    )
    if config.batch_size % trainer.world_size:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes = {trainer.world_size}, got {config.batch_size}"
        )
    if trainer.is_global_zero:
        _claim(out, config.resume)
    splits = open_data(
        config.data,
        image_size=config.image_size,
        resize_size=config.resize_size,
        augment=config.augment,
        min_scale=config.min_scale,
    )
    train_images, val_images = splits.train, splits.val
    assert train_images is not None  # since they were asked for
    config = _with_classes(config, len(splits.classes))
    resume, epoch = _checkpoint_to_resume(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = create_model(
        config.arch,
        kernel_num=config.kernel_num,
        reduction=config.reduction,
        num_classes=config.num_classes or len(splits.classes),
        dropout=config.dropout,
        weights=None if resume else config.weights,
        stem=config.stem,
    )
    if trainer.is_global_zero:
        _write(out / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        print(_introduction(config, model, len(train_images), len(val_images)), flush=True)
    place = {"rank": trainer.global_rank, "world_size": trainer.world_size}
    train_loader = training_loader(train_images, config.batch_size, config.workers, seed=config.seed, **place)
    train_loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # Lightning begins to read before it says so
    val_loader = evaluation_loader(val_images, config.test_batch, config.workers, **place)
    try:
        trainer.fit(Training(model, config, splits.classes), train_loader, val_loader, ckpt_path=resume)
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None  # Lightning would report success
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    result = _result(config, model, history.rows)
    if trainer.is_global_zero:
        _write(out / "result.json", json.dumps(result, indent=2) + "\n")
        print(
            f"top-1 {result['top1']:.2f} %, best {result['best_top1']:.2f} % after epoch {result['best_epoch']}: "
            f"{out / 'best.ckpt'}",
            flush=True,
        )
    return result


def _claim(out: Path, resume: str | None) -> None:
    """Make the folder of the run, and see that it can be written and holds nothing that would be lost."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"the output folder {out} cannot be written: {error.strerror}") from error
    if resume is None and any(out.iterdir()):
        raise FileExistsError(f"the output folder {out} is not empty; resume=auto goes on with a run that is in it")


def _checkpoints(out: Path) -> list[Callback]:
    # the best comes first: if the run is killed between the two, resuming repeats the epoch and with it the best
    options: dict[str, Any] = {"dirpath": out, "enable_version_counter": False, "save_on_train_epoch_end": True}
    return [
        ModelCheckpoint(filename="best", monitor="val_top1", mode="max", **options),
        ModelCheckpoint(filename="last", **options),
    ]


def _with_classes(config: TrainConfig, classes: int) -> TrainConfig:
    if config.num_classes is not None and config.num_classes < classes:
        raise ValueError(f"num_classes must be at least {classes}, the classes in the data, got {config.num_classes}")
    return replace(config, num_classes=config.num_classes or classes)


def _checkpoint_to_resume(config: TrainConfig) -> tuple[Path | None, int]:
    """Return the checkpoint to go on from and the epoch that is next, counted from 0."""
    path = Path(config.out, "last.ckpt") if config.resume == "auto" else Path(config.resume or "")
    if config.resume is None or (config.resume == "auto" and not path.exists()):
        return None, 0
    read_state_dict(path)  # says what is wrong with a file
    checkpoint = CheckpointFiles().load_checkpoint(path)
    if "odconv" not in checkpoint:
        raise ValueError(f"cannot resume {path}: it holds no state of a training run; weights={path} starts from it")
    for name in NETWORK_OPTIONS:
        before, now = checkpoint["hyper_parameters"][name], getattr(config, name)
        if before != now:
            raise ValueError(f"cannot resume {path}: its {name} is {before}, that of this run {now}")
    if checkpoint["epoch"] + 1 > config.epochs:
        raise ValueError(f"epochs must be at least {checkpoint['epoch'] + 1} to resume {path}, got {config.epochs}")
    return path, checkpoint["epoch"] + 1


def _introduction(config: TrainConfig, model: nn.Module, train_images: int, val_images: int) -> str:
    return (
        f"{config.arch}: {_parameters(model) / 1e6:.2f}M parameters, {config.num_classes} classes, "
        f"{train_images} images to train on and {val_images} to evaluate on, results in {config.out}"
    )


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _result(config: TrainConfig, model: nn.Module, rows: list[Row]) -> dict[str, Any]:
    best = max(rows, key=lambda row: row["top1"])
    return {
        "arch": config.arch,
        "kernel_num": config.kernel_num,
        "parameters": _parameters(model),
        "epochs": len(rows),
        "top1": rows[-1]["top1"],
        "top5": rows[-1]["top5"],
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "train_seconds_per_epoch": mean(row["train_seconds"] for row in rows),
        "val_seconds_per_epoch": mean(row["val_seconds"] for row in rows),
    }


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text)
