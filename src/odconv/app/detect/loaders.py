"""Which process gets which images, in which batches."""

from pathlib import Path

from odconv.app.detect.coco import Annotations
from odconv.app.detect.config import DetectConfig
from odconv.app.detect.images import CocoImages, collate
from odconv.app.detect.sampler import GroupedSampler
from odconv.app.engine.loaders import Loader, TrainingLoader, evaluation_loader, reading


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
    place = {"rank": rank, "world_size": world_size}
    return train_loader, evaluation_loader(val_images, config.test_batch, config.workers, **place, collate_fn=collate)
