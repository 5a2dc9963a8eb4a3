"""Reading images: files of any kind to RGB, and a data set that survives unreadable ones."""

import glob
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from odconv.data.transforms import Transform

IGNORE = -100
"""Label of a sample that must not count: an unreadable image, or the padding of a distributed evaluation."""

logger = logging.getLogger(__name__)


class Images(Dataset[tuple[Tensor, int]]):
    """Images with labels.

    An image that cannot be read is named in a warning and answered with a blank image labelled IGNORE: batches keep
    their shape, training goes on, and whoever collects the labels can count them. The index ``len(images)`` is answered
    likewise, without the warning: it is the padding of :class:`EvaluationSampler`.

    Args:
        sources: files, or arrays (H, W) or (H, W, 3) of bytes.
        labels: class index of each.
        transform: from an RGB PIL image to a tensor (3, image_size, image_size).
        image_size: side of a blank image, in pixels.
    """

    def __init__(
        self, sources: Sequence[str] | np.ndarray, labels: Sequence[int], transform: Transform, image_size: int
    ) -> None:
        self.sources, self.labels, self.transform, self.image_size = sources, labels, transform, image_size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == len(self):
            return self._blank(), IGNORE
        try:
            image = read_image(self.sources[index])
        except OSError as error:
            logger.warning("%s", error)
            return self._blank(), IGNORE
        return self.transform(image), int(self.labels[index])

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        # without it, a plain loop would run on into the padding
        return (self[index] for index in range(len(self)))

    def _blank(self) -> Tensor:
        return torch.zeros(3, self.image_size, self.image_size)


def read_image(source: str | Path | np.ndarray) -> Image.Image:
    """Read a file, or take an array of bytes, as an RGB image.

    Transparency is laid over white, 16-bit grey is scaled to 8 bits, the first frame stands for an animation, and a
    rotation noted in EXIF is ignored, as the usual loaders do.

    Args:
        source: a file, or an array (H, W) or (H, W, 3) of bytes.

    Returns:
        The image, in mode RGB.

    Raises:
        OSError: the file is missing, no image, truncated or unreasonably large; the message names it.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(Image.fromarray(source))
    try:
        with Image.open(source) as image:
            return _to_rgb(image)
    except Exception as error:  # on a damaged file PIL's decoders raise SyntaxError, struct.error and many more
        raise OSError(f"unreadable image {source}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # PIL would clip these at 255
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def is_image_name(name: str | Path) -> bool:
    """Say whether a file's name is that of an image, and not hidden."""
    base = os.path.basename(name)
    return base.lower().endswith(IMG_EXTENSIONS) and not base.startswith(".")


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """List image files.

    Args:
        paths: files, folders (searched through all levels for names of images) and patterns such as "photos/*.jpg".

    Returns:
        The files in the order given, those of one folder or pattern sorted, each once.

    Raises:
        FileNotFoundError: a path where nothing is, or a folder or pattern without an image.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        images: list[Path] = []
        for match in matches:
            images += sorted(filter(is_image_name, match.rglob("*"))) if match.is_dir() else [match]
        if not images:
            raise FileNotFoundError(f"no image found at {path}" if matches else f"no such file or folder: {path}")
        found.update(dict.fromkeys(images))
    return list(found)
