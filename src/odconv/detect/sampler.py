"""Batches of images of like shape, so that little of a batch is padding."""

import math
from collections.abc import Sequence

import torch

from odconv.data import TrainingSampler


class GroupedSampler(TrainingSampler):
    """Shuffle images so that every batch, of all processes together, is of one group.

    As :class:`odconv.data.TrainingSampler`, the order is a function of (seed, epoch). Where the number of a group's
    images does not divide, the first ones of its order are taken once more.

    Args:
        groups: the group of each image.
        batch_size: images in a batch of one process.
        seed: seed of the run.
        rank: which process this is, from 0.
        world_size: number of processes.

    Raises:
        ValueError: there are no images, or `rank` is not in 0 .. world_size - 1.
    """

    def __init__(
        self, groups: Sequence[int], batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(len(groups), seed, rank, world_size)
        kinds = torch.tensor(groups)
        self.members = [torch.where(kinds == group)[0] for group in kinds.unique()]
        self.batch_size = batch_size

    def __len__(self) -> int:
        in_step = self.batch_size * self.world_size
        return sum(math.ceil(len(group) / in_step) for group in self.members) * self.batch_size

    def _whole_order(self) -> list[int]:
        generator, shape = self._generator(), (-1, self.world_size, self.batch_size)
        steps = torch.cat(
            [
                fill(group[torch.randperm(len(group), generator=generator)], self.world_size * self.batch_size).view(
                    shape
                )
                for group in self.members
            ]
        )
        order = steps[torch.randperm(len(steps), generator=generator), self.rank].flatten()
        whole: list[int] = order.tolist()
        return whole


def fill(order: torch.Tensor, multiple: int) -> torch.Tensor:
    """Repeat an order from its start until its length is a multiple."""
    length = math.ceil(len(order) / multiple) * multiple
    return order.repeat(math.ceil(length / len(order)))[:length]
