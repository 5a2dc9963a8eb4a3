"""A detector's training run: everything is checked and put together first, then Lightning's Trainer works."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from odconv.app.detect.coco import Annotations, check_files, read_annotations
from odconv.app.detect.config import DetectConfig
from odconv.app.detect.images import CocoImages, collate
from odconv.app.detect.module import DetectionHistory, DetectorTraining
from odconv.app.detect.restore import build
from odconv.app.detect.sampler import GroupedSampler
from odconv.app.engine.layer_options import check_fall, resolve_layers, with_norm
from odconv.app.engine.loaders import Loader, TrainingLoader, evaluation_loader, reading
from odconv.app.engine.resume import Resumed, describe_resumption, find_resumed
from odconv.app.engine.run_folder import conclusion, lock_folder, place, write_beginning, write_result
from odconv.app.engine.trainer import explained, make_training
from odconv.app.pages.reports import refresh_report
from odconv.checkpoints import Checkpoint, find_checkpoint
from odconv.layers import find_temperature
from odconv.models.detectors.builder import find_conventions
from odconv.profiling.count import count_parameters
from odconv.system.text import first_few

FIXED = (
    *("detector", "frozen_stages", "norm_eval", "blend_epochs"),
    *("masked_pool", "anchor_sizes", "group", "negatives"),
)
"""Options of detectors that a resumed run must share with its checkpoint: the network, the order of the images."""

logger = logging.getLogger(__name__)


def run(config: DetectConfig) -> dict[str, Any]:
    """Train a detector; see :func:`odconv.app.detect.train`."""
    history = DetectionHistory(Path(config.out))
    trainer = make_training(config, "val_ap", [history], benchmark=False)  # images differ in size from step to step
    with lock_folder(Path(config.out), config.resume) if trainer.is_global_zero else nullcontext():
        return _train(config, trainer, history)


def _train(config: DetectConfig, trainer: pl.Trainer, history: DetectionHistory) -> dict[str, Any]:
    training, evaluation = read_data(config)
    check_fall(config.arch, config.warm_start, "blend_epochs", config.blend_epochs)
    config = replace(config, **resolve_layers(config))
    resumed = find_resumed(config, training.classes, FIXED)
    weights = find_checkpoint(config.weights) if config.weights and not resumed.path else None
    config = replace(config, layer_options=with_norm(config, config.warm_start, resumed.options))
    config = replace(config, **_inherited(config, resumed, weights))
    pl.seed_everything(config.seed, workers=True, verbose=False)
    fresh = config if not resumed.path else replace(config, weights=None, weights_backbone=None, warm_start=False)
    model = build(fresh, len(training.classes), weights)
    if not resumed.path:
        config = replace(config, temperature=find_temperature(model))
    if trainer.is_global_zero:
        write_beginning(config, resumed, trainer.world_size)
        print(
            f"{config.detector} on {config.arch}: {count_parameters(model) / 1e6:.2f}M parameters, "
            f"{len(training.classes)} classes, {len(training.images)} images to train on and "
            f"{len(evaluation.images)} to evaluate on, {place(config)}",
            *filter(None, (training.describe_dropped(), evaluation.describe_dropped())),
            *describe_resumption(config, resumed),
            sep="\n",
            flush=True,
        )
    train_loader, val_loader = make_loaders(config, training, evaluation, trainer.global_rank, trainer.world_size)
    train_loader.go_to(resumed.epoch, resumed.batch)
    with explained(trainer.world_size):
        trainer.fit(DetectorTraining(model, config, evaluation), train_loader, val_loader, ckpt_path=resumed.path)
    best, last = max(history.rows, key=lambda row: row["ap"]), history.rows[-1]
    result = {
        "detector": config.detector,
        "arch": config.arch,
        "kernel_num": config.kernel_num,
        "parameters": count_parameters(model),
        "epochs": len(history.rows),
        **{name: score for name, score in last.items() if name in ("ap", "ap50", "mask_ap", "mask_ap50")},
        "best_ap": best["ap"],
        "best_epoch": best["epoch"],
        "train_seconds": sum(row["train_seconds"] for row in history.rows),
        "val_seconds": sum(row["val_seconds"] for row in history.rows),
    }
    if trainer.is_global_zero:
        write_result(config, resumed, result)
        if not config.fast_dev_run:
            refresh_report(config.out)
        scores = f"{history.describe(last)}, best AP {best['ap']:.2f} after epoch {best['epoch']}"
        print(conclusion(config, scores), flush=True)
    return result


def _inherited(config: DetectConfig, resumed: Resumed, weights: Checkpoint | None) -> dict[str, Any]:
    """Return whose arithmetic to compute with, and the temperature: those of the weights, unless they were chosen.

    Warn of what differs from the weights, and raise a ValueError if it does from a run that is to go on.
    """
    if resumed.path:
        before = {name: resumed.options[name] for name in ("conventions", "temperature")}
        for name, be, that in (("conventions", "are", "those"), ("temperature", "is", "that")):
            if (now := getattr(config, name)) not in (None, before[name]):
                raise ValueError(
                    f"cannot resume {resumed.path}: its {name} {be} {before[name]}, {that} of this run {now}"
                )
        return before
    options = weights.options if weights else {}
    for name in ("anchor_sizes", "temperature"):
        if name in options and (now := getattr(config, name)) not in (None, options[name]):
            logger.warning("%s was trained with %s %s, and goes on with %s", config.weights, name, options[name], now)
    return {"conventions": config.conventions or find_conventions(weights)}


def read_data(config: DetectConfig) -> tuple[Annotations, Annotations]:
    """Read what is on the images to train and to evaluate on, and see that they fit each other and are there."""
    root, masks = Path(config.data), config.detector == "mask_rcnn"
    training = read_annotations(root / config.train_annotations, config.classes, masks)
    evaluation = read_annotations(root / config.val_annotations, config.classes, masks)
    learnable, scored = training.without_empty(), evaluation.without_empty()  # objects there must be
    if training.labels.keys() != evaluation.labels.keys() or training.classes != evaluation.classes:
        only = (sorted({*a.classes} - {*b.classes}) for a, b in ((training, evaluation), (evaluation, training)))
        first, second = (first_few(names, none="none, but other ids") for names in only)
        raise ValueError(
            f"{training.path} and {evaluation.path} have different categories; only in the first: {first}; only in "
            f"the second: {second}"
        )
    check_files(training, root / config.train_images)
    check_files(evaluation, root / config.val_images)
    if config.fast_dev_run:
        evaluation = scored  # the few images of a trial must have what can be scored
    return training if config.negatives else learnable, evaluation


def make_loaders(
    config: DetectConfig, training: Annotations, evaluation: Annotations, rank: int = 0, world_size: int = 1
) -> tuple[TrainingLoader, Loader]:
    """Return batches to train on, shuffled, and to evaluate on, of this process's share of the images."""
    root, masks = Path(config.data), config.detector == "mask_rcnn"
    images = CocoImages(training, root / config.train_images, config.augment, masks)
    share = config.batch_size // world_size  # of a step
    groups = [int(image["width"] > image["height"] and config.group) for image in training.images]
    sampler = GroupedSampler(groups, share, config.seed, rank, world_size)
    how = reading(config.workers, world_size)
    train_loader = TrainingLoader(images, share // config.accumulate, sampler=sampler, collate_fn=collate, **how)
    val_images = CocoImages(evaluation, root / config.val_images)
    place = {"rank": rank, "world_size": world_size}
    return train_loader, evaluation_loader(val_images, config.test_batch, config.workers, **place, collate_fn=collate)
