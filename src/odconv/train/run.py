"""A training run: everything is checked and put together first, then Lightning's Trainer works."""

import inspect
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from odconv.checkpoints import read_state_dict
from odconv.data import open_data
from odconv.files import check_writable, replacing
from odconv.models import METHODS, create_model, split_name
from odconv.train.config import TrainConfig
from odconv.train.files import CheckpointFiles
from odconv.train.history import History, Row
from odconv.train.loaders import evaluation_loader, training_loader
from odconv.train.module import Training
from odconv.train.schedule import temperature
from odconv.train.trainer import make_trainer

FIXED = ("arch", "kernel_num", "reduction", "num_classes", "stem", "seed", "batch_size", "temp_epoch", "temp_init")
"""Options that a resumed run must share with its checkpoint: the network, the order of the images, the temperature."""

LOCK = ".lock"
LOCK_WAIT = 10
"""Seconds; processes that read images for a run that was killed hold its lock for some 5 s longer."""


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
    with _claim(out, config.resume) if trainer.is_global_zero else nullcontext():
        return _train(config, trainer, history)


def _train(config: TrainConfig, trainer: pl.Trainer, history: History) -> dict[str, Any]:
    out = Path(config.out)
    splits = open_data(
        config.data,
        image_size=config.image_size,
        resize_size=config.resize_size,
        augment=config.augment,
        min_scale=config.min_scale,
    )
    train_images, val_images = splits.train, splits.val
    assert train_images is not None  # since they were asked for
    config = _resolve(config, len(splits.classes))
    resume, epoch, saved = _checkpoint_to_resume(config, splits.classes)
    finished = epoch == config.epochs and (out / "result.json").exists()
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
        if not finished:
            _write(out / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        if resume and not (out / "best.ckpt").exists() and (best := resume.with_name("best.ckpt")).exists():
            with replacing(out / best.name) as partial:
                shutil.copyfile(best, partial)
        print(_introduction(config, model, len(train_images), len(val_images)), flush=True)
        changes = {
            name: value
            for name, value in asdict(config).items()
            if name != "resume" and value != saved.get(name, value)
        }
        if changes:
            print(
                "changed: " + ", ".join(f"{name} {saved[name]} -> {value}" for name, value in changes.items()),
                flush=True,
            )
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
        if not finished:
            _write(out / "result.json", json.dumps(result, indent=2) + "\n")
        print(
            f"top-1 {result['top1']:.2f} %, best {result['best_top1']:.2f} % after epoch {result['best_epoch']}: "
            f"{out / 'best.ckpt'}",
            flush=True,
        )
    return result


@contextmanager
def _claim(out: Path, resume: str | None) -> Iterator[None]:
    """Make the folder of the run and keep others out of it; see that it holds nothing that would be lost."""
    check_writable(out)
    inside = resume == "auto" or (resume is not None and out.resolve() in Path(resume).resolve().parents)
    _check_empty(out, inside)
    lock = FileLock(out / LOCK, timeout=LOCK_WAIT)
    try:
        lock.acquire()
    except Timeout as error:
        raise OSError(f"another run is writing to {out}") from error
    try:
        _check_empty(out, inside)  # another run may have been quicker
        for partial in out.glob(".*.partial"):  # of a run that was killed
            partial.unlink()
        yield
    finally:
        lock.release()


def _check_empty(out: Path, unless: bool) -> None:
    if not unless and {path.name for path in out.iterdir()} - {LOCK}:
        raise FileExistsError(f"the output folder {out} is not empty; resume=auto goes on with a run that is in it")


class _Checkpoint(ModelCheckpoint):
    """Goes on with the best score so far in whatever folder the run now is; Lightning does in the same one alone."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = Path(self.dirpath or "")
        if (folder / "best.ckpt").exists():
            here = {name: str(folder / Path(name).name) for name in state_dict["best_k_models"]}
            paths = ("best_model_path", "kth_best_model_path", "last_model_path")
            state_dict = {
                **state_dict,
                **{name: state_dict[name] and str(folder / Path(state_dict[name]).name) for name in paths},
                "best_k_models": {here[name]: score for name, score in state_dict["best_k_models"].items()},
                "dirpath": self.dirpath,
            }
        super().load_state_dict(state_dict)


def _checkpoints(out: Path) -> list[ModelCheckpoint]:
    # the best comes first: if the run is killed between the two, resuming repeats the epoch and with it the best
    options: dict[str, Any] = {"dirpath": out, "enable_version_counter": False, "save_on_train_epoch_end": True}
    return [
        _Checkpoint(filename="best", monitor="val_top1", mode="max", **options),
        _Checkpoint(filename="last", **options),
    ]


def _resolve(config: TrainConfig, classes: int) -> TrainConfig:
    """Return the options with what was left to the network and the data filled in."""
    if config.num_classes is not None and config.num_classes < classes:
        raise ValueError(f"num_classes must be at least {classes}, the classes in the data, got {config.num_classes}")
    config = replace(config, num_classes=config.num_classes or classes)
    method_name, _ = split_name(config.arch)
    if method_name is None:
        return config
    method = METHODS[method_name]
    defaults = {name: parameter.default for name, parameter in inspect.signature(method.layer).parameters.items()}
    given = {"kernel_num": config.kernel_num, "reduction": config.reduction}
    return replace(
        config,
        **{
            name: (defaults | method.options).get(name) if value is None else value  # type: ignore[arg-type]
            for name, value in given.items()
        },
    )


def _checkpoint_to_resume(config: TrainConfig, classes: list[str]) -> tuple[Path | None, int, dict[str, Any]]:
    """Return the checkpoint to go on from, the epoch that is next, counted from 0, and the options it was made with."""
    path = Path(config.out, "last.ckpt") if config.resume == "auto" else Path(config.resume or "")
    if config.resume is None or (config.resume == "auto" and not path.exists()):
        return None, 0, {}
    read_state_dict(path)  # says what is wrong with a file
    checkpoint = CheckpointFiles().load_checkpoint(path)
    if "odconv" not in checkpoint:
        raise ValueError(f"cannot resume {path}: it holds no state of a training run; weights={path} starts from it")
    saved, known = checkpoint["hyper_parameters"], checkpoint["odconv"]["classes"]
    for name in FIXED:
        before, now = saved[name], getattr(config, name)
        if before != now:
            raise ValueError(f"cannot resume {path}: its {name} is {before}, that of this run {now}")
    if known != classes:
        there, here = ([name for name in a if name not in b] for a, b in ((known, classes), (classes, known)))
        raise ValueError(
            f"cannot resume {path}: its classes are others than those of the data: only the checkpoint has "
            f"{', '.join(there[:8]) or 'none'}, only the data has {', '.join(here[:8]) or 'none'}"
        )
    if checkpoint["epoch"] + 1 > config.epochs:
        raise ValueError(f"epochs must be at least {checkpoint['epoch'] + 1} to resume {path}, got {config.epochs}")
    return path, checkpoint["epoch"] + 1, saved


def _introduction(config: TrainConfig, model: nn.Module, train_images: int, val_images: int) -> str:
    last = temperature(config, config.epochs, 1)
    return (
        f"{config.arch}: {_parameters(model) / 1e6:.2f}M parameters, {config.num_classes} classes, "
        f"{train_images} images to train on and {val_images} to evaluate on, results in {config.out}"
        + (f"; the temperature will end at {last:.4g}" if last > 1 and split_name(config.arch)[0] else "")
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
