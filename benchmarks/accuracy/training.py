"""One training, by odconv's own trainer: begun, or gone on with from its last epoch, and then a row."""

import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from benchmarks.accuracy.cells import Cell
from benchmarks.accuracy.networks import ABLATIONS, METHODS, build, described
from benchmarks.common import origin, subset

from odconv.app.classify.config import TrainConfig
from odconv.app.classify.module import AccuracyHistory, ClassifierTraining
from odconv.app.data import Images, open_data
from odconv.app.engine.loaders import evaluation_loader, training_loader
from odconv.app.engine.resume import find_resumed
from odconv.app.engine.run_folder import write_beginning
from odconv.app.engine.trainer import make_training
from odconv.profiling.count import count_parameters

FOLDERS = {"imagenette": "imagenette96", "cifar10": "cifar10"}
VALIDATION = 10  # one in so many training images is cut off, where recipes are chosen
MEASURED = 2000  # so many of them at most are measured on
SPLIT_SEED = 0  # the same images for every cell
MIN_SCALE = 0.35  # of a crop


def train(cell: Cell, data: Path, out: Path, workers: int) -> dict[str, Any]:
    """Train a cell's network in the folder `out`, or go on there; return the row."""
    recipe, method = cell.recipe, (METHODS | ABLATIONS)[cell.method]
    images, tested, classes = open_images(cell, data)
    config = options_of(cell, data, out, workers, len(classes))
    resumed = find_resumed(config, classes, ())
    write_beginning(config, resumed, processes=1)
    history = AccuracyHistory(out)
    trainer = make_training(config, "val_top1", [history])
    pl.seed_everything(cell.seed, verbose=False)
    model = build(cell.network, cell.method, recipe.stem, len(classes), recipe.dropout, recipe.start)
    loader = training_loader(images, config.batch_size, workers, seed=cell.seed)
    loader.go_to(resumed.epoch, resumed.batch)
    tests = evaluation_loader(tested, config.test_batch, workers)
    try:
        trainer.fit(ClassifierTraining(model, config, classes), loader, tests, ckpt_path=resumed.path)
    except FloatingPointError as error:  # a result, too
        print(error, flush=True)
    last = history.rows[-1] if len(history.rows) == recipe.epochs else {}
    return {
        "study": cell.study,
        "dataset": cell.dataset,
        "network": cell.network,
        "method": cell.method,
        "kernel_num": method.kernel_num or "",
        "seed": cell.seed,
        "split": cell.split,
        "parameters": count_parameters(model),
        "train_images": len(images),
        **asdict(recipe),
        **{name: f"{last[name]:.4f}" if last else "diverged" for name in ("top1", "top5", "train_loss")},
        "seconds": f"{sum(row['train_seconds'] for row in history.rows):.0f}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "finished": time.strftime("%Y-%m-%d"),
        **origin(),
    }


def options_of(cell: Cell, data: Path, out: Path, workers: int, classes: int) -> TrainConfig:
    """The options of `odconv train` that describe a cell's training, apart from the images of its split."""
    recipe, method = cell.recipe, (METHODS | ABLATIONS)[cell.method]
    arch, layer_options = described(cell.network, cell.method, recipe.start)
    return TrainConfig(
        out=str(out),
        arch=arch,
        kernel_num=method.kernel_num,
        reduction=layer_options.pop("reduction", None),
        init=layer_options.pop("init", "calm"),
        layer_options=layer_options or None,
        num_classes=classes,
        data=str(data / FOLDERS[cell.dataset]),
        image_size=recipe.image_size,
        resize_size=recipe.image_size,
        min_scale=MIN_SCALE,
        augment=recipe.augment,
        stem=recipe.stem,
        dropout=recipe.dropout,
        channels_last=True,  # on processors faster, for static networks too
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        test_batch=250,
        lr=recipe.lr,
        lr_decay="cos",
        wd=recipe.wd,
        temp_init=recipe.temp_init,
        temp_epoch=recipe.temp_share * recipe.epochs,  # type: ignore[arg-type]  # a fraction of an epoch is fine
        devices=1,
        seed=cell.seed,
        workers=workers,
        resume="auto",
    )


def open_images(cell: Cell, data: Path) -> tuple[Images, Images, list[str]]:
    """The images to train on, those to measure on, and the names of the classes.

    Where recipes are chosen, both are parts of the training images, and the test images are not looked at.
    """
    recipe = cell.recipe
    splits = opened(str(data / FOLDERS[cell.dataset]), recipe.image_size, recipe.augment)
    shuffled = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    cut = len(shuffled) // VALIDATION
    if cell.split == "test":
        return subset(splits.train, shuffled[: recipe.images]), splits.val, splits.classes
    held_out = Images(splits.train.sources, splits.train.labels, splits.val.transform, recipe.image_size)
    kept = shuffled[cut:][: recipe.images]
    return subset(splits.train, kept), subset(held_out, shuffled[:cut][:MEASURED]), splits.classes


@cache
def opened(folder: str, image_size: int, augment: Any) -> Any:
    return open_data(folder, image_size=image_size, resize_size=image_size, augment=augment, min_scale=MIN_SCALE)
