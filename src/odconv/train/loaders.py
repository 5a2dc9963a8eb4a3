"""Who gets which images, in which order."""

from typing import Any

import torch
from lightning.fabric.utilities.data import suggested_max_num_workers
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from odconv.data import EvaluationSampler, Images


class Shuffle(DistributedSampler):
    """Shuffles by seed and epoch alone, and seeds the augmentation by them too, so that resuming is exact.

    Args:
        images: what to draw from.
        seed: seed of the run.
        rank: which process this is, from 0.
        world_size: number of processes.
    """

    def __init__(self, images: Dataset, seed: int, rank: int, world_size: int) -> None:
        super().__init__(images, world_size, rank, shuffle=True, seed=seed)
        self.generator = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0."""
        super().set_epoch(epoch)
        self.generator.manual_seed(hash((self.seed, epoch, self.rank)))


def training_loader(
    images: Images, batch_size: int, workers: int | None = None, *, seed: int = 0, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Return batches of this process's share of the images, shuffled, another order every epoch.

    As published, a last batch that is smaller is kept; but not one of a single image, on which batch norm after a
    global pool, or on a map of 1 x 1, cannot work.

    Args:
        images: what to train on.
        batch_size: images in a step, over all processes.
        workers: processes that read images; default by the number of CPU cores, at most 8.
        seed: seed of the run.
        rank: which process this is, from 0.
        world_size: number of processes.
    """
    sampler, share = Shuffle(images, seed, rank, world_size), batch_size // world_size
    return DataLoader(
        images,
        share,
        sampler=sampler,
        drop_last=len(sampler) > share > 1 and len(sampler) % share == 1,
        generator=sampler.generator,
        **_reading(workers, world_size),
    )


def evaluation_loader(
    images: Images, batch_size: int, workers: int | None = None, *, rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Return batches of this process's share of the images, in order, each image once; arguments as above."""
    sampler = EvaluationSampler(len(images), rank, world_size)
    return DataLoader(images, max(1, batch_size // world_size), sampler=sampler, **_reading(workers, world_size))


def _reading(workers: int | None, world_size: int) -> dict[str, Any]:
    if workers is None:
        workers = min(8, suggested_max_num_workers(world_size))
    return {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
