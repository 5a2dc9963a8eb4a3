"""Reading images: files of any kind to RGB, and a data set that survives unreadable ones."""

import glob
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import pil_to_tensor

from odconv.app.data.sampler import Draw
from odconv.app.data.shards import ShardError
from odconv.app.data.transforms import Transform
from odconv.system.files import open_regular

IGNORE = -100
"""Label of a sample that must not count: an unreadable image, or the padding of a distributed evaluation."""

Sources: TypeAlias = Sequence[str] | Sequence[bytes] | np.ndarray
"""Images by their index: files, contents of files, or arrays; taking one may raise an OSError."""

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"),
    *(["AVIF"] if find_spec("PIL.AvifImagePlugin") else []),  # of Pillow since 11.3
)
"""Pillow's names of the formats that are read, whatever a file is called; of the others some start programs, as
PostScript does, or open further files."""

EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".avif")
"""Of a user's own images."""

LARGE = 10**8
"""Pixels of an image that PIL shall judge, which refuses unreasonable ones."""

LARGEST = 5 * 10**8
"""Bytes of a file."""

WORK = 10**9
"""Pixels of a JPEG times its scans, through each of which a decoder goes over all pixels: some seconds."""
JPEG, SCAN = b"\xff\xd8", b"\xff\xda"
"""What a JPEG begins with, and what each of its scans does, and what occurs within none."""

logger = logging.getLogger(__name__)


def read_image(
    source: str | Path | bytes | np.ndarray, upright: bool = False, pixels: int | None = None
) -> Image.Image:
    """Read a file in one of FORMATS, or take its content or an array of bytes, as an RGB image.

    Transparency is laid over white, 16-bit grey is scaled to 8 bits, and the first frame stands for an animation.

    Args:
        source: a file, its content, or an array (H, W) or (H, W, 3) of bytes.
        upright: rotate as EXIF notes it, for photographs as a camera saves them. Default: ignore it, as the usual
            loaders of data sets do.
        pixels: how many it may have; default: as many as Pillow takes for reasonable, 178,956,970.

    Returns:
        The image, in mode RGB.

    Raises:
        OSError: the file is missing, no image, truncated or unreasonably large; the message names it.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(Image.fromarray(source))
    name = f"of {len(source)} bytes" if isinstance(source, bytes) else source
    try:
        with _open(source) as file, Image.open(file, formats=FORMATS) as image:
            _check_work(file, image, pixels)
            image.load()
            return _to_rgb(_upright(image) if upright else image)
    except UnidentifiedImageError as error:
        raise OSError(f"unreadable image {name}: it is no image, or of an unknown kind") from error
    except Image.DecompressionBombError as error:  # before anything was decoded
        reason, *_ = str(error).split(",")
        raise OSError(f"unreadable image {name}: {reason}") from error
    except Exception as error:  # on a damaged file PIL's decoders raise SyntaxError, struct.error and many more
        raise OSError(f"unreadable image {name}: {error}") from error


def _open(source: str | Path | bytes) -> BinaryIO:
    """Open what PIL can go back in; of all pipes, those alone that the process was given, such as /dev/stdin."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if str(source).startswith(("/dev/stdin", "/dev/fd/")) and Path(source).is_fifo():
        with open(source, "rb") as pipe:
            content = pipe.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise OSError(f"it has more than the {LARGEST:,} bytes that are allowed")
        return io.BytesIO(content)
    return open_regular(source, LARGEST)


def _check_work(file: BinaryIO, image: Image.Image, pixels: int | None) -> None:
    """Raise an OSError where it would take too long to decode an image that was opened."""
    count = image.width * image.height
    if pixels is not None and count > pixels:
        raise OSError(f"it has {image.width} x {image.height} pixels, and {pixels:,} are allowed")
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        scans = file.read().count(SCAN)
        if count * scans > WORK:
            raise OSError(f"its {scans} scans of {count:,} pixels each take too long to decode: {WORK:,} are allowed")


def read_pixels(source: str | Path | bytes | np.ndarray) -> Tensor:
    """Read the pixels that :func:`read_image` does, as bytes (3, H, W); a JPEG sooner.

    The transforms are faster on them, too, but round a little differently when they resize.

    Args:
        source: a file, its content, or an array (H, W) or (H, W, 3) of bytes.

    Raises:
        OSError: as :func:`read_image`.
    """
    if not isinstance(source, np.ndarray):
        try:
            with _open(source) as file:
                start = file.read(len(JPEG))
                encoded = start + file.read() if start == JPEG else start
            height, width, colours, _ = decode_jpeg_header(encoded)
            pixels, scans = height * width, encoded.count(SCAN)
            if colours in ("YCbCr", "Gray") and pixels <= LARGE and pixels * scans <= WORK:
                return torch.from_numpy(decode_jpeg(encoded)).permute(2, 0, 1)
        except (OSError, ValueError):  # no JPEG, or a damaged one: PIL has the last word
            pass
    return pil_to_tensor(read_image(source))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is no reason to lose the image, and raises about everything
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":  # PIL would clip them at 0 and 255
        raise ValueError("its pixels are floating-point numbers, of a range that it does not say")
    if image.mode == "I" or image.mode.startswith("I;16"):  # PIL would clip these at 255
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class Images(Dataset[tuple[Tensor, int]]):
    """Images with labels.

    An image that cannot be read is named in a warning and answered with a blank image labelled IGNORE: batches keep
    their shape, training goes on, and whoever collects the labels can count them. The index ``len(images)`` is answered
    likewise, without the warning: it is the padding of :class:`EvaluationSampler`. An index may come with a seed, as
    from :class:`TrainingSampler`: then the transform depends on the seed alone, whichever process calls it, and when.

    Args:
        sources: files, or arrays (H, W) or (H, W, 3) of bytes, or files' contents.
        labels: class index of each.
        transform: from what `read` returns to bytes (3, image_size, image_size).
        image_size: side of a blank image, in pixels.
        read: how a source is read: :func:`read_image`, or :func:`read_pixels`, which is faster.
    """

    def __init__(
        self,
        sources: Sources,
        labels: Sequence[int] | np.ndarray,
        transform: Transform,
        image_size: int,
        read: Callable[[Any], Image.Image | Tensor] = read_image,
    ) -> None:
        self.sources, self.labels, self.transform, self.image_size = sources, labels, transform, image_size
        self.read = read

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, int]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        if index == len(self):
            return self._blank(), IGNORE
        try:
            image = self.read(self.sources[index])
        except ShardError:  # a warning for the whole shard was enough
            return self._blank(), IGNORE
        except OSError as error:
            logger.warning("%s (image %d)", error, index)
            return self._blank(), IGNORE
        if seed is None:
            return self.transform(image), int(self.labels[index])
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(seed)
            return self.transform(image), int(self.labels[index])

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        # without it, a plain loop would run on into the padding
        return (self[index] for index in range(len(self)))

    def _blank(self) -> Tensor:
        return torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)


def is_image_name(name: str | Path, extensions: tuple[str, ...] = IMG_EXTENSIONS) -> bool:
    """Say whether a file's name is that of an image, by default of those in data sets, and not hidden."""
    base = os.path.basename(name)
    return base.lower().endswith(extensions) and not base.startswith(".")


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
            if match.is_dir():
                images += sorted(file for file in match.rglob("*") if is_image_name(file, EXTENSIONS))
            else:
                images.append(match)
        if not images:
            raise FileNotFoundError(f"no image found at {path}" if matches else f"no such file or folder: {path}")
        found.update(dict.fromkeys(images))
    return list(found)


def find_existing(paths: Iterable[str | Path]) -> tuple[list[Path], dict[str, str]]:
    """List image files as :func:`find_images` does, and go on where there is none.

    Returns:
        The files, and the reason why there is none for each of the paths where that is so.
    """
    found: dict[Path, None] = {}
    missing: dict[str, str] = {}
    for path in paths:
        try:
            found.update(dict.fromkeys(find_images([path])))
        except OSError as error:
            missing[str(path)] = str(error)
    return list(found), missing


def readable_images(paths: Iterable[str | Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Yield the images at files, folders and patterns, and name on stderr those that cannot be read."""
    found, missing = find_existing(paths)
    for reason in missing.values():
        print(reason, file=sys.stderr)
    for path in found:
        try:
            image = read_image(path)
        except OSError as error:
            print(error, file=sys.stderr)
        else:
            yield path, image
