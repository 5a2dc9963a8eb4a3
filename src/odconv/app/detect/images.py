"""COCO's images with what is on them, as a detector wants it, and how they are augmented."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from odconv.app.data import read_pixels
from odconv.app.data.sampler import Draw
from odconv.app.detect.coco import Annotations
from odconv.app.detect.config import Augment
from odconv.app.detect.masks import decode_masks

Target: TypeAlias = dict[str, Tensor]
"""What is on an image: `index` of the image, UNREADABLE where it does not count; `boxes` (N, 4) in pixels (x1, y1, x2,
y2), `labels` (N), and `masks` (N, H, W) if there are any."""

UNREADABLE = -1
BLANK = 32
"""Side of a blank image in pixels."""

logger = logging.getLogger(__name__)


def augmentation(augment: Augment) -> Callable[[Any, Target], tuple[Any, Target]]:
    """Return a transform of an image and its target.

    "flip": left and right are swapped in every second image, as published. "strong": besides, colours are distorted and
    parts are cut out (as for SSD), for few images. "crop": besides, parts of 384 to 600 pixels of every second image
    are cut out (as for DETR). "none": nothing. Boxes are cut off at the image's border; those less than a pixel wide or
    high are left out, with labels and masks.
    """
    parts: list[nn.Module] = []
    if augment == "strong":
        parts = [v2.RandomPhotometricDistort(), v2.RandomIoUCrop()]
    elif augment == "crop":
        parts = [v2.RandomApply([v2.RandomShortestSize([400, 500, 600]), RandomPart(384, 600)])]
    flip = [v2.RandomHorizontalFlip()] if augment != "none" else []
    transform: Callable[[Any, Target], tuple[Any, Target]] = v2.Compose(
        [*parts, *flip, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
    )
    return transform


class RandomPart(v2.Transform):
    """Cuts out a part whose sides are drawn between two lengths in pixels, or are the image's where it is shorter."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw a part."""
        whole = v2.query_size(flat_inputs)
        sides = [min(side, int(torch.randint(self.least, self.most + 1, ()))) for side in whole]
        top, left = (int(torch.randint(side - part + 1, ())) for side, part in zip(whole, sides, strict=True))
        return {"top": top, "left": left, "height": sides[0], "width": sides[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut it out."""
        return self._call_kernel(v2.functional.crop, inpt, **params)


class CocoImages(Dataset[tuple[Tensor, Target]]):
    """Images as bytes (3, H, W), with their targets, which lack crowds; alone, for evaluation, without `augment`.

    An image that cannot be read, or has another size than its annotations say, is named in a warning and answered with
    a blank one whose `index` is UNREADABLE. The index ``len(images)`` is answered likewise, without the warning: it is
    the padding of an evaluation. An index may come with a seed, as from a training sampler: then the augmentation
    depends on the seed alone.
    """

    def __init__(
        self, annotations: Annotations, folder: str | Path, augment: Augment | None = None, masks: bool = False
    ) -> None:
        self.annotations, self.folder, self.masks = annotations, Path(folder), masks
        self.transform = augmentation(augment) if augment else None

    def __len__(self) -> int:
        return len(self.annotations.images)

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, Target]:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        if index == len(self):
            return self._blank()
        entry = self.annotations.images[index]
        try:
            image = read_pixels(self.folder / entry["file_name"])
        except OSError as error:
            logger.warning("%s (image %s)", error, entry["id"])
            return self._blank()
        if image.shape[1:] != (entry["height"], entry["width"]):
            height, width = image.shape[1:]
            logger.warning(
                "%s is %d x %d pixels, and %d x %d by its annotations (image %s)",
                *(self.folder / entry["file_name"], width, height, entry["width"], entry["height"], entry["id"]),
            )
            return self._blank()
        if self.transform is None:
            return image, {"index": torch.tensor(index)}
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(seed)
            picture, target = self.transform(tv_tensors.Image(image), self._target(index))
        return picture.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in target.items()}

    def _target(self, index: int) -> Target:
        entry = self.annotations.images[index]
        size, labels = (entry["height"], entry["width"]), self.annotations.labels
        objects = [item for item in self.annotations.objects[index] if not item["iscrowd"]]
        boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        target: Target = {
            "index": torch.tensor(index),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([labels[item["category_id"]] for item in objects], dtype=torch.int64),
        }
        if self.masks:
            target["masks"] = tv_tensors.Mask(decode_masks([item["segmentation"] for item in objects], *size))
        return target

    def _blank(self) -> tuple[Tensor, Target]:
        blank: Target = {"index": torch.tensor(UNREADABLE)}
        if self.transform:
            blank |= {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
            if self.masks:
                blank["masks"] = torch.zeros(0, BLANK, BLANK, dtype=torch.uint8)
        return torch.zeros(3, BLANK, BLANK, dtype=torch.uint8), blank


def collate(items: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Put images of any sizes into a batch."""
    images, targets = zip(*items, strict=True)
    return list(images), list(targets)
