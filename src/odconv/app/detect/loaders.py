"""Which process gets which images, in which batches."""

from pathlib import Path

from odconv.app.data import EvaluationSampler
from odconv.app.detect.coco import Annotations
from odconv.app.detect.config import DetectConfig
from odconv.app.detect.images import CocoImages, collate
from odconv.app.detect.sampler import GroupedSampler
from odconv.app.engine.loaders import Loader, TrainingLoader, reading


def make_loaders(
    config: DetectConfig, training: Annotations, evaluation: Annotations, rank: int = 0, world_size: int = 1
) -> tuple[TrainingLoader, Loader]:
    """Return batches to train on, shuffled, and to evaluate on, of this process's share of the images."""
    root, masks = Path(config.data), config.detector == "mask_rcnn"
    images = CocoImages(training, root / config.train_images, config.augment, masks)
    share = config.batch_size // world_size  # of a step
    groups = images.shapes() if config.group else [0] * len(images)
    sampler = GroupedSampler(groups, share, config.seed, rank, world_size)
    how = reading(config.workers, world_size)
    train_loader = TrainingLoader(images, share // config.accumulate, sampler=sampler, collate_fn=collate, **how)
    val_images = CocoImages(evaluation, root / config.val_images)
    return train_loader, evaluation_loader(val_images, config.test_batch, config.workers, rank, world_size)


def evaluation_loader(images: CocoImages, batch_size: int, workers: int | None, rank: int, world_size: int) -> Loader:
    """Return batches of this process's share of the images, each image once."""
    sampler = EvaluationSampler(len(images), rank, world_size)
    share = max(1, batch_size // world_size)
    return Loader(images, share, sampler=sampler, collate_fn=collate, **reading(workers, world_size))
