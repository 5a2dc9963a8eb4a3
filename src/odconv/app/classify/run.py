"""A training run: everything is checked and put together first, then Lightning's Trainer works."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
from torch import nn

from odconv.app.classify.attention_log import AttentionStatistics
from odconv.app.classify.config import TrainConfig
from odconv.app.classify.drop_path import drop_paths
from odconv.app.classify.module import AccuracyHistory, ClassifierTraining
from odconv.app.classify.schedule import blend, temperature
from odconv.app.data import open_data
from odconv.app.data.transforms import evaluation_sizes
from odconv.app.engine.history import Row
from odconv.app.engine.layer_options import check_fall, layer_options, resolve_layers, with_norm
from odconv.app.engine.loaders import evaluation_loader, training_loader
from odconv.app.engine.resume import describe_resumption, find_resumed
from odconv.app.engine.run_folder import conclusion, lock_folder, place, write_beginning, write_result
from odconv.app.engine.trainer import explained, make_training
from odconv.app.pages.reports import refresh_report
from odconv.layers import find_temperature
from odconv.models.build import create_model, split_name
from odconv.models.zoo import WAREHOUSE
from odconv.profiling.count import count_parameters

FIXED = ("num_classes", "stem", "temp_epoch", "temp_init")
"""Options of classifiers that a resumed run must share with its checkpoint: the network, the temperature."""

logger = logging.getLogger(__name__)


def run(config: TrainConfig) -> dict[str, Any]:
    """Train a network; see :func:`odconv.app.classify.train`."""
    out, history = Path(config.out), AccuracyHistory(Path(config.out))
    callbacks = [history, AttentionStatistics(out)]
    trainer = make_training(config, "val_top1", callbacks, sync_batchnorm=config.sync_batch_norm)
    if config.sync_batch_norm and trainer.strategy.root_device.type != "cuda":
        raise ValueError("sync_batch_norm works on GPUs alone, and there is none here")
    with lock_folder(out, config.resume) if trainer.is_global_zero else nullcontext():
        return _train(config, trainer, history)


def _train(config: TrainConfig, trainer: pl.Trainer, history: AccuracyHistory) -> dict[str, Any]:
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
    check_fall(config.arch, config.warm_start, "temp_epoch", config.temp_epoch)
    resumed = find_resumed(config, splits.classes, FIXED)
    config = replace(config, layer_options=with_norm(config, config.warm_start, resumed.options))
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = create_model(
        config.arch,
        kernel_num=config.kernel_num,
        reduction=config.reduction,
        num_classes=config.num_classes or len(splits.classes),
        dropout=config.dropout,
        weights=None if resumed.path else config.weights,
        stem=config.stem,
        warm_start=config.warm_start and not resumed.path,
        new_classifier=config.new_classifier and not resumed.path,
        **layer_options(config),
    )
    if config.drop_path:
        drop_paths(model, config.drop_path)
    if trainer.is_global_zero:
        write_beginning(config, resumed, trainer.world_size)
        introduction = _introduction(config, model, len(train_images), len(val_images))
        print(introduction, *describe_resumption(config, resumed), sep="\n", flush=True)
    share = {"rank": trainer.global_rank, "world_size": trainer.world_size}
    in_a_batch = config.batch_size // config.accumulate
    train_loader = training_loader(train_images, in_a_batch, config.workers, seed=config.seed, **share)
    train_loader.go_to(resumed.epoch, resumed.batch)
    if resumed.batch and resumed.processes != trainer.world_size and hasattr(train_images.sources, "sizes"):
        logger.warning(
            "%s processes had begun this epoch and %d go on: of images in shards, some are seen twice in it, some not",
            resumed.processes,
            trainer.world_size,
        )
    val_loader = evaluation_loader(val_images, config.test_batch, config.workers, **share)
    with explained(trainer.world_size):
        trainer.fit(ClassifierTraining(model, config, splits.classes), train_loader, val_loader, ckpt_path=resumed.path)
    result = _result(config, model, history.rows)
    if trainer.is_global_zero:
        write_result(config, resumed, result)
        if not config.fast_dev_run:
            refresh_report(config.out)
        scores = f"top-1 {result['top1']:.2f} %, best {result['best_top1']:.2f} % after epoch {result['best_epoch']}"
        print(conclusion(config, scores), flush=True)
    return result


def _resolve(config: TrainConfig, classes: int) -> TrainConfig:
    """Return the options with what was left to the network and the data filled in."""
    if config.num_classes is not None and config.num_classes < classes:
        raise ValueError(f"num_classes must be at least {classes}, the classes in the data, got {config.num_classes}")
    chosen = resolve_layers(config)
    _, resized = evaluation_sizes(config.image_size, config.resize_size)
    return replace(config, num_classes=config.num_classes or classes, resize_size=resized, **chosen)


def _introduction(config: TrainConfig, model: nn.Module, train_images: int, val_images: int) -> str:
    method, _ = split_name(config.arch)
    end = temperature(config, config.epochs, 1) or find_temperature(model) or 1
    falls, end, goal = ("temperature", end, 1) if method != WAREHOUSE else ("blend", blend(config, config.epochs, 1), 0)
    return (
        f"{config.arch}: {count_parameters(model) / 1e6:.2f}M parameters, {config.num_classes} classes, "
        f"{train_images} images to train on and {val_images} to evaluate on, {place(config)}"
        + (f"; the {falls} will end at {end:.4g}" if end > goal and method else "")
    )


def _result(config: TrainConfig, model: nn.Module, rows: list[Row]) -> dict[str, Any]:
    best = max(rows, key=lambda row: row["top1"])
    return {
        "arch": config.arch,
        "kernel_num": config.kernel_num,
        "parameters": count_parameters(model),
        "epochs": len(rows),
        "top1": rows[-1]["top1"],
        "top5": rows[-1]["top5"],
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "train_seconds_per_epoch": mean(row["train_seconds"] for row in rows),
        "val_seconds_per_epoch": mean(row["val_seconds"] for row in rows),
    }
