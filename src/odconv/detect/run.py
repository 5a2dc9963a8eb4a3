"""A detector's training run: everything is checked and put together first, then Lightning's Trainer works."""

import logging
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from odconv.checkpoints import resolve
from odconv.detect.builder import find_conventions
from odconv.detect.coco import Annotations, check_files, read_annotations
from odconv.detect.config import DetectConfig
from odconv.detect.course import DetectorCourse
from odconv.detect.loaders import make_loaders
from odconv.detect.module import DetectorTraining
from odconv.detect.restore import build
from odconv.train.claim import claim
from odconv.train.faults import explained
from odconv.train.files import BEST
from odconv.train.launch import (
    count_parameters,
    describe_resumption,
    make_run,
    resolve_layers,
    write_beginning,
    write_result,
)
from odconv.train.restore import saved_by_training
from odconv.train.resume import Resumed, find_resumed

FIXED = ("detector", "frozen_stages", "norm_eval", "temperature", "anchor_sizes", "group", "negatives")
"""Options of detectors that a resumed run must share with its checkpoint: the network, the order of the images."""

logger = logging.getLogger(__name__)


def run(config: DetectConfig) -> dict[str, Any]:
    """Train a detector; see :func:`odconv.detect.train`."""
    course = DetectorCourse(Path(config.out))
    trainer = make_run(config, "val_ap", [course], benchmark=False)  # images differ in size from step to step
    with claim(Path(config.out), config.resume) if trainer.is_global_zero else nullcontext():
        return _train(config, trainer, course)


def _train(config: DetectConfig, trainer: pl.Trainer, course: DetectorCourse) -> dict[str, Any]:
    training, evaluation = read_data(config)
    config = replace(config, **resolve_layers(config.arch, config.kernel_num, config.reduction))
    resumed = find_resumed(config, training.classes, FIXED)
    config = replace(config, conventions=_conventions(config, resumed))
    pl.seed_everything(config.seed, workers=True, verbose=False)
    fresh = config if not resumed.path else replace(config, weights=None, weights_backbone=None, warm_start=False)
    model = build(fresh, len(training.classes))
    if trainer.is_global_zero:
        write_beginning(config, resumed, trainer.world_size)
        print(
            f"{config.detector} on {config.arch}: {count_parameters(model) / 1e6:.2f}M parameters, "
            f"{len(training.classes)} classes, {len(training.images)} images to train on and "
            f"{len(evaluation.images)} to evaluate on, results in {config.out}",
            *filter(None, (training.describe_dropped(), evaluation.describe_dropped())),
            *describe_resumption(config, resumed),
            sep="\n",
        )
        sys.stdout.flush()
    train_loader, val_loader = make_loaders(config, training, evaluation, trainer.global_rank, trainer.world_size)
    train_loader.go_to(resumed.epoch, resumed.batch)
    with explained(trainer.world_size):
        trainer.fit(DetectorTraining(model, config, evaluation), train_loader, val_loader, ckpt_path=resumed.path)
    best, last = max(course.rows, key=lambda row: row["ap"]), course.rows[-1]
    result = {
        "detector": config.detector,
        "arch": config.arch,
        "kernel_num": config.kernel_num,
        "parameters": count_parameters(model),
        "epochs": len(course.rows),
        **{name: score for name, score in last.items() if name in ("ap", "ap50", "mask_ap", "mask_ap50")},
        "best_ap": best["ap"],
        "best_epoch": best["epoch"],
        "train_seconds": sum(row["train_seconds"] for row in course.rows),
        "val_seconds": sum(row["val_seconds"] for row in course.rows),
    }
    if trainer.is_global_zero:
        write_result(config, resumed, result)
        print(
            f"{course.describe(last)}, best AP {best['ap']:.2f} after epoch {best['epoch']}: {Path(config.out) / BEST}",
            flush=True,
        )
    return result


def _conventions(config: DetectConfig, resumed: Resumed) -> Any:
    """Return whose arithmetic to compute with: that of the weights, unless it was chosen; and warn of what differs."""
    if resumed.path:
        before = resumed.options["conventions"]
        if config.conventions not in (None, before):
            raise ValueError(
                f"cannot resume {resumed.path}: its conventions are {before}, those of this run {config.conventions}"
            )
        return before
    if config.weights:
        options, _ = saved_by_training(resolve(config.weights))
        for name in ("anchor_sizes", "temperature"):
            if name in options and options[name] != (now := getattr(config, name)):
                logger.warning(
                    "%s was trained with %s %s, and goes on with %s", config.weights, name, options[name], now
                )
    return config.conventions or find_conventions(config.weights)


def read_data(config: DetectConfig) -> tuple[Annotations, Annotations]:
    """Read what is on the images to train and to evaluate on, and see that they are there.

    Raises:
        FileNotFoundError: annotations, or images that they list, are missing.
        ValueError: annotations that nothing can be learned from, or of other classes for evaluation.
    """
    root, masks = Path(config.data), config.detector == "mask_rcnn"
    training = read_annotations(root / config.train_annotations, config.classes, masks)
    evaluation = read_annotations(root / config.val_annotations, config.classes, masks)
    learnable, _ = training.without_empty(), evaluation.without_empty()  # objects there must be
    if training.labels.keys() != evaluation.labels.keys() or training.classes != evaluation.classes:
        only = (sorted({*a.classes} - {*b.classes}) for a, b in ((training, evaluation), (evaluation, training)))
        first, second = (", ".join(names[:8]) or "none, but other ids" for names in only)
        raise ValueError(
            f"{training.path} and {evaluation.path} have different categories; only in the first: {first}; only in "
            f"the second: {second}"
        )
    check_files(training, root / config.train_images)
    check_files(evaluation, root / config.val_images)
    return training if config.negatives else learnable, evaluation
