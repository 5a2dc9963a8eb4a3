"""Steps of images of like shape, so that little of a batch is padding."""

import math
from collections.abc import Sequence

import torch

from odconv.app.data.sampler import TrainingSampler, fill


class GroupedSampler(TrainingSampler):
    """Shuffle images so that every step, of all processes together, is of one group; `batch_size` is that of a process.

    As :class:`odconv.app.data.TrainingSampler`, the order is a function of (seed, epoch). Where the number of a group's
    images does not divide, the first ones of its order are taken once more.
    """

    def __init__(
        self, groups: Sequence[int], batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(len(groups), seed, rank, world_size)
        kinds = torch.tensor(groups)
        self.members = [torch.where(kinds == group)[0] for group in kinds.unique()]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return sum(self._whole_steps(len(group)) for group in self.members) // self.world_size

    def _whole_steps(self, images: int) -> int:
        """Return the number of images, of all processes, in steps that have room for so many."""
        in_step = self.batch_size * self.world_size
        return math.ceil(images / in_step) * in_step

    def _whole_order(self) -> list[int]:
        generator, step = self._generator(), (self.world_size, self.batch_size)
        shuffled = (group[torch.randperm(len(group), generator=generator)] for group in self.members)
        steps = torch.cat([fill(group, self._whole_steps(len(group))).view(-1, *step) for group in shuffled])
        order = steps[torch.randperm(len(steps), generator=generator), self.rank]  # (steps, batch_size)
        whole: list[int] = order.flatten().tolist()
        return whole
