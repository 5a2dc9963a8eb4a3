"""What a classifier says of many images, one after the other."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from odconv.app.data import find_existing, read_image
from odconv.app.data.parallel import ahead, count_readers
from odconv.app.predict.classifier import Classifier


class Guess(NamedTuple):
    """A class, by its name and its place among the outputs, from 0, and its probability in %."""

    name: str
    output: int
    percent: float


class Prediction(NamedTuple):
    """The classes of an image, the most probable first."""

    image: Path
    guesses: list[Guess]


class Unreadable(NamedTuple):
    """An image that could not be read, and why."""

    image: Path
    reason: str


class Predictions:
    """What a classifier says of images, in their order; counts as it goes through them.

    Args:
        classifier: see :func:`odconv.app.predict.load_classifier`.
        images: files, folders, or patterns such as "photos/*.jpg"; each file counts once.
        top: how many classes to give of each.
        batch_size: images that the network is given at a time. Default: 64 on a GPU, 4 elsewhere, where more take
            longer.
        workers: threads that read images ahead; 0: none, they are read in between. Default: by the number of CPU cores,
            at most 8.

    Attributes:
        paths: the files found.
        missing: the arguments at which there is no image.
        unreadable: these, and the files that could not be read so far.
        read: number of images predicted so far.
        waited: seconds spent waiting for images to be read.
        computed: seconds spent computing.
    """

    def __init__(
        self,
        classifier: Classifier,
        images: Iterable[str | Path],
        *,
        top: int = 5,
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> None:
        self.classifier, self.top = classifier, min(top, len(classifier.classes))
        self.batch_size = batch_size or (64 if classifier.device.type == "cuda" else 4)
        self.workers = count_readers() if workers is None else workers
        self.paths, missing = find_existing(images)
        self.missing = [Unreadable(Path(path), reason) for path, reason in missing.items()]
        self._start()

    def _start(self) -> None:
        self.unreadable = [*self.missing]
        self.read, self.waited, self.computed = 0, 0.0, 0.0

    def __iter__(self) -> Iterator[Prediction | Unreadable]:
        """Yield a prediction of each image that can be read, and each that cannot.

        Raises:
            ValueError: the network gives no numbers.
        """
        self._start()
        yield from self.missing
        batch: list[tuple[Path, Tensor]] = []
        start = time.perf_counter()
        for path, result in ahead(self._read, self.paths, self.workers, 2 * self.batch_size):
            self.waited += time.perf_counter() - start
            if isinstance(result, Tensor):
                batch.append((path, result))
            else:
                self.unreadable.append(Unreadable(path, result))
                yield self.unreadable[-1]
            if len(batch) == self.batch_size:
                yield from self._predict(batch)
                batch = []
            start = time.perf_counter()
        if batch:
            yield from self._predict(batch)

    def _read(self, path: Path) -> tuple[Path, Tensor | str]:
        try:
            image = read_image(path, upright=True)
        except OSError as error:
            return path, str(error)
        return path, self.classifier.prepare(image)

    def _predict(self, batch: list[tuple[Path, Tensor]]) -> list[Prediction]:
        start = time.perf_counter()
        logits = self.classifier(torch.stack([image for _, image in batch]))
        if not logits.isfinite().all():
            raise ValueError(f"{self.classifier.name} gives logits that are no finite numbers, near {batch[0][0]}")
        best = logits.softmax(dim=1).topk(self.top)
        self.computed += time.perf_counter() - start
        self.read += len(batch)
        rows = zip(batch, best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            Prediction(
                path,
                [Guess(self.classifier.classes[i], i, 100 * p) for i, p in zip(indices, values, strict=True)],
            )
            for (path, _), indices, values in rows
        ]
