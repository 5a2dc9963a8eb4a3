"""Exact evaluation over several processes."""

import math
from collections.abc import Iterator

from torch.utils.data import Sampler


class EvaluationSampler(Sampler[int]):
    """Share indices out among processes, each exactly once.

    All processes get equally many, so that they stay in step: where the number does not divide, the last index of some
    is `length`, which :class:`odconv.data.Images` answers with a blank image labelled IGNORE. (PyTorch's
    DistributedSampler repeats images there, which shifts the accuracy.)

    Args:
        length: number of images.
        rank: which process this is, from 0.
        world_size: number of processes.

    Raises:
        ValueError: `length` is negative, or `rank` is not in 0 .. world_size - 1.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. world_size - 1 = {world_size - 1}, got {rank}")
        self.length, self.rank, self.world_size = length, rank, world_size

    def __len__(self) -> int:
        return math.ceil(self.length / self.world_size)

    def __iter__(self) -> Iterator[int]:
        for step in range(len(self)):
            yield min(step * self.world_size + self.rank, self.length)
