"""From an image to bytes of one size: the published evaluation, and four ways to augment; then normalising."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

Augment: TypeAlias = Literal["imagenet", "randaugment", "small", "none"]
Transform: TypeAlias = Callable[[Image.Image | Tensor], Tensor]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def evaluation_sizes(
    image_size: int | None = None, resize_size: int | None = None, recorded: Mapping[str, Any] | None = None
) -> tuple[int, int]:
    """Return the sizes of the evaluation in pixels: the side of the square that is cropped, the shorter side before.

    They are as given, else as recorded in a file by their names, else 224 and 8/7 of the side, which is 256 for 224.
    Where the side is another than the file says, the shorter one is in proportion.
    """
    side, resized = 224, 256
    if recorded and recorded.get("image_size"):
        side = recorded["image_size"]
        resized = recorded.get("resize_size") or round(side * 256 / 224)
    size = image_size or side
    return size, resize_size or round(size * resized / side)


def evaluation_transform(image_size: int = 224, resize_size: int | None = None) -> Transform:
    """Resize and crop the centre, as published ImageNet accuracies are measured.

    Args:
        image_size: side of the square that is cropped, in pixels.
        resize_size: length that the shorter side is resized to first (bilinear, antialiased), in pixels; default: 8/7
            of `image_size`, which is 256 for 224.

    Returns:
        A function from an RGB PIL image to bytes (3, image_size, image_size), for :func:`normalise`.

    Raises:
        ValueError: `image_size` is not positive, or `resize_size` is smaller.
    """
    _check_sizes(image_size, resize_size)
    _, resized = evaluation_sizes(image_size, resize_size)
    return v2.Compose([v2.Resize(resized), v2.CenterCrop(image_size), v2.PILToTensor()])


def training_transform(
    image_size: int = 224,
    resize_size: int | None = None,
    augment: Augment = "imagenet",
    *,
    min_scale: float = 0.08,
    flip: bool = True,
) -> Transform:
    """Augment.

    Args:
        image_size: side of the result, in pixels.
        resize_size: as in :func:`evaluation_transform`; used by "none" only.
        augment: "imagenet": a random part of the image, resized, and a horizontal flip. "randaugment": these, and two
            of RandAugment's changes of colour or shape, of magnitude 9. "small" (for CIFAR-like images): shifted by up
            to an eighth of the side, and a horizontal flip. "none": the evaluation transform.
        min_scale: smallest share of the image's area that the first two cut out. The published 0.08 suits long training
            on large images; short training on small ones wants more (0.35 for Imagenette).
        flip: False leaves the flips out, for images whose mirror image means something else, such as digits.

    Returns:
        A function from an RGB PIL image, or bytes (3, H, W), to bytes (3, image_size, image_size), for
        :func:`normalise`. Given bytes it is faster, and its resize rounds a little differently.

    Raises:
        ValueError: an unknown `augment`, `min_scale` outside (0, 1], or sizes that do not fit.
    """
    if augment not in get_args(Augment):
        raise ValueError(f"augment must be one of {', '.join(get_args(Augment))}, got {augment!r}")
    if not 0 < min_scale <= 1:
        raise ValueError(f"min_scale must be above 0 and at most 1, got {min_scale}")
    if augment == "none":
        return evaluation_transform(image_size, resize_size)
    _check_sizes(image_size)
    if augment == "small":
        crop = [v2.Resize(image_size), v2.RandomCrop(image_size, padding=image_size // 8)]
    else:
        crop = [v2.RandomResizedCrop(image_size, scale=(min_scale, 1.0))]
    mirrored = [v2.RandomHorizontalFlip()] if flip else []
    changed = [v2.RandAugment()] if augment == "randaugment" else []
    return v2.Compose([*crop, *mirrored, *changed, v2.PILToTensor()])


def normalise(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Normalise with a mean and a standard deviation, on the device where the images are.

    Args:
        images: bytes (..., 3, H, W).
        mean: of each channel, where white is 1. Default: ImageNet's.
        std: of each channel. Default: ImageNet's.

    Returns:
        What networks see, in float32.
    """
    scaled = v2.functional.to_dtype(images, torch.float32, scale=True)
    return v2.functional.normalize(scaled, list(mean), list(std), inplace=True)


def _check_sizes(image_size: int, resize_size: int | None = None) -> None:
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if resize_size is not None and resize_size < image_size:
        raise ValueError(f"resize_size must be at least image_size = {image_size}, got {resize_size}")
