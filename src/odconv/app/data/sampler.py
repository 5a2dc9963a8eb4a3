"""Which images a process gets, and in which order: functions of seed, epoch and place, without a state to save."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

Draw = tuple[int, int]
"""Index of an image, and the seed of its augmentation."""

BUFFER = 4096
"""Images of neighbouring shards that are shuffled among each other."""


class TrainingSampler(Sampler[Draw]):
    """Share shuffled indices out among processes, another order every epoch, each with the seed of its augmentation.

    The order is a function of (seed, epoch), a seed of (seed, epoch, index): nothing needs to be saved to go on in the
    middle of an epoch, see :meth:`go_to`. All processes get equally many; where the number does not divide, the first
    ones of the order are taken once more.

    Images in shards are shuffled so that a process reads few shards at a time: the shards are shuffled, each process
    takes a stretch of them, and within it the images of a buffer.

    Args:
        length: number of images.
        seed: seed of the run.
        rank: which process this is, from 0.
        world_size: number of processes.
        shards: number of images in each shard; default: they are not in shards.

    Raises:
        ValueError: there are no images, or `rank` is not in 0 .. world_size - 1.
    """

    def __init__(
        self, length: int, seed: int = 0, rank: int = 0, world_size: int = 1, shards: Sequence[int] | None = None
    ) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        _check_rank(rank, world_size)
        self.length, self.seed, self.rank, self.world_size, self.shards = length, seed, rank, world_size, shards
        self.epoch = self.start = 0

    def go_to(self, epoch: int, start: int) -> None:
        """Begin an epoch, counted from 0, behind the first `start` images of this process."""
        self.epoch, self.start = epoch, start

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; one that was begun by :meth:`go_to` stays where it is."""
        if epoch != self.epoch:
            self.go_to(epoch, 0)

    def __len__(self) -> int:
        return math.ceil(self.length / self.world_size)

    def __iter__(self) -> Iterator[Draw]:
        order = self._whole_order() if self.shards is None else self._order_of_shards(self.shards)
        for index in order[self.start :]:
            yield index, hash((self.seed, self.epoch, index))

    def _whole_order(self) -> list[int]:
        order = torch.randperm(self.length, generator=self._generator())
        return fill(order, len(self) * self.world_size)[self.rank :: self.world_size].tolist()

    def _order_of_shards(self, shards: Sequence[int]) -> list[int]:
        generator = self._generator()
        stops = torch.tensor(shards).cumsum(0).tolist()
        order = torch.cat(
            [torch.arange(stops[i] - shards[i], stops[i]) for i in torch.randperm(len(shards), generator=generator)]
        )
        share = fill(order, len(self) * self.world_size)[self.rank * len(self) : (self.rank + 1) * len(self)]
        return [
            index
            for buffer in share.split(BUFFER)
            for index in buffer[torch.randperm(len(buffer), generator=generator)].tolist()
        ]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.seed, self.epoch)))


class EvaluationSampler(Sampler[int]):
    """Share indices out among processes, each exactly once.

    All processes get equally many, so that they stay in step: where the number does not divide, the last index of some
    is `length`, which :class:`odconv.app.data.Images` answers with a blank image labelled IGNORE. (PyTorch's
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
        _check_rank(rank, world_size)
        self.length, self.rank, self.world_size = length, rank, world_size

    def __len__(self) -> int:
        return math.ceil(self.length / self.world_size)

    def __iter__(self) -> Iterator[int]:
        for step in range(len(self)):
            yield min(step * self.world_size + self.rank, self.length)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0 .. world_size - 1 = {world_size - 1}, got {rank}")


def fill(order: torch.Tensor, length: int) -> torch.Tensor:
    """Repeat an order from its start until it has so many entries."""
    return order.repeat(math.ceil(length / len(order)))[:length]
