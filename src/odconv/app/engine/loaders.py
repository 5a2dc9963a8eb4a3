"""Who gets which images, in which order, and how long training waits for them."""

import atexit
import multiprocessing
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from odconv.app.data import EvaluationSampler, Images, TrainingSampler
from odconv.app.data.parallel import count_readers

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What tells a run to save and end: torchrun, systemd and clusters send the first, SLURM's users often the second.

Windows has no second."""


class Loader(DataLoader):
    """Batches; the processes that read them leave SIGTERM and SIGUSR1 to the one that trains, which saves.

    torchrun and others send them to the whole group. They are blocked while the processes are started, since these
    inherit that: a handler would come too late in some.
    """

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):  # on Windows, which sends these to one process
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@atexit.register
def end_readers() -> None:
    """End the processes that an error left reading: multiprocessing would wait for what its SIGTERM does not reach."""
    if readers := [process for process in multiprocessing.active_children() if process.daemon]:
        if hasattr(signal, "SIGCHLD"):  # of which PyTorch would make an error
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in readers:
            process.kill()


class TrainingLoader(Loader):
    """Batches for training that can begin in the middle of an epoch; `waited` is the time it was waited for, in s.

    Its length is that of a whole epoch, wherever it begins.
    """

    waited = 0.0

    def go_to(self, epoch: int, batch: int) -> None:
        """Begin an epoch, counted from 0, behind its first batches."""
        self.sampler.go_to(epoch, batch * (self.batch_size or 1))  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch

    # Lightning asks for the two below before it trusts a loader to go on in mid-epoch; go_to does it without a state
    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where to begin is a function of the step."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, see above."""


def training_loader(
    images: Images, batch_size: int, workers: int | None = None, *, seed: int = 0, rank: int = 0, world_size: int = 1
) -> TrainingLoader:
    """Return batches of this process's share of the images, shuffled, another order every epoch.

    As published, a last batch that is smaller is kept; but not one of a single image, on which batch norm after a
    global pool, or on a map of 1 x 1, cannot work. `batch_size` is over all processes; `workers` are processes that
    read images, by default by the number of CPU cores, at most 8.
    """
    shards = getattr(images.sources, "sizes", None)
    sampler, share = TrainingSampler(len(images), seed, rank, world_size, shards), batch_size // world_size
    return TrainingLoader(
        images,
        share,
        sampler=sampler,
        drop_last=len(sampler) > share > 1 and len(sampler) % share == 1,
        **reading(workers, world_size),
    )


def evaluation_loader(
    images: Any, batch_size: int, workers: int | None = None, *, rank: int = 0, world_size: int = 1, **options: Any
) -> Loader:
    """Return batches of this process's share of the images, in order, each image once; arguments as above.

    The images may be those of a detector, too; `options` are further ones of PyTorch's DataLoader.
    """
    sampler, share = EvaluationSampler(len(images), rank, world_size), max(1, batch_size // world_size)
    return Loader(images, share, sampler=sampler, **options, **reading(workers, world_size))


def reading(workers: int | None, world_size: int) -> dict[str, Any]:
    """Return how a loader reads: arguments of PyTorch's DataLoader; see :func:`training_loader`."""
    workers = count_readers(world_size) if workers is None else workers
    return {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
