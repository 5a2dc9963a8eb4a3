"""COCO's annotation files: read, checked, and cleaned of what cannot be learned."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from odconv.app.detect.masks import decode_masks
from odconv.system.text import first_few, suggest

MOST_PIXELS = 178_956_970
"""Of an image; larger ones are not read, since Pillow takes them for unreasonable."""
LONGEST = 10**6
"""Pixels that the outline of a mask may go over; drawing takes time and memory in proportion."""
PARTS = ("images", "annotations", "categories")


@dataclass
class Annotations:
    """What is on a set of images.

    `images` and `categories` are COCO's entries, the latter by ascending `id`: the label of one is its place + 1.
    `objects` are those of each image, crowds included; each has a proper `bbox`, `area`, `iscrowd`. `dropped` has the
    ids of the annotations that were left out, by what is wrong with them.
    """

    path: Path
    images: list[dict[str, Any]]
    objects: list[list[dict[str, Any]]]
    categories: list[dict[str, Any]]
    dropped: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, label 1 first."""
        return [category["name"] for category in self.categories]

    @property
    def labels(self) -> dict[int, int]:
        """The label of each category id."""
        return {category["id"]: label for label, category in enumerate(self.categories, 1)}

    def describe_dropped(self) -> str:
        """Say what was left out; nothing if nothing was."""
        if not self.dropped:
            return ""
        reasons = [f"{len(ids)} {reason} (ids {first_few(ids)})" for reason, ids in self.dropped.items()]
        return f"left out of {self.path}: {'; '.join(reasons)}"

    def without_empty(self) -> "Annotations":
        """Return those images alone that have an object to find, crowds aside; ValueError if there is none."""
        kept = [i for i, objects in enumerate(self.objects) if any(not item["iscrowd"] for item in objects)]
        if not kept:
            raise ValueError(f"{self.path} has no image with an object to find; {self.describe_dropped()}".rstrip("; "))
        return replace(self, images=[self.images[i] for i in kept], objects=[self.objects[i] for i in kept])


def read_annotations(path: str | Path, classes: Sequence[str] | None = None, masks: bool = False) -> Annotations:
    """Read an annotation file, such as annotations/instances_train2017.json.

    Objects that nothing can be learned from are left out and noted by their ids: of images or categories that are not
    listed, or of images too large to be read; without a box, with one that is not finite, of zero or negative size or
    outside of the image; and, if masks are asked for, without one, with one of another size than the image, or whose
    outline is longer than a million pixels. Images without any object are kept, and polygons of fewer than three points
    are taken out of masks. Of the categories, those of certain names can be chosen.

    It is a ValueError if the file is none, or an entry lacks what nothing can be done without, or all lack masks.
    """
    path = Path(path)
    images, annotations, all_categories = _parts(path)
    sizes = _sizes(path, images)
    categories = _choose(path, all_categories, classes)
    known, listed = ({category["id"] for category in some} for some in (categories, all_categories))
    if masks and annotations and not any(item.get("segmentation") for item in annotations):
        raise ValueError(f"Mask R-CNN needs masks, and {path} has none; faster_rcnn needs boxes alone")
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    dropped: dict[str, list[Any]] = defaultdict(list)
    for number, item in enumerate(annotations):
        fault, mask = _fault(item, sizes, listed), None
        if masks and not fault:
            fault, mask = _check_mask(item.get("segmentation"), *sizes[item["image_id"]])
        if fault:
            dropped[fault].append(item.get("id", f"entry {number}"))
        elif item["category_id"] in known:
            x, y, width, height = map(float, item["bbox"])
            area = item.get("area")
            by_image[item["image_id"]].append(
                {
                    "category_id": item["category_id"],
                    "bbox": [x, y, width, height],
                    "area": area if _is_number(area) else width * height,
                    "iscrowd": int(item.get("iscrowd") or 0),
                }
                | ({"segmentation": mask} if masks else {})
            )
    return Annotations(path, images, [by_image[image["id"]] for image in images], categories, dict(dropped))


def check_files(annotations: Annotations, folder: str | Path) -> None:
    """See that the folder and the listed images are there; else a FileNotFoundError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of images {folder} does not exist")
    names = [image["file_name"] for image in annotations.images]
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(names)} images listed in {annotations.path} are not in {folder}: "
            f"{first_few(absent)}"
        )


def _parts(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"the annotation file {path} does not exist"
            f"{suggest(path.name, (file.name for file in path.parent.glob('*.json')))}"
        )
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the annotation file {path} is no JSON: {error}") from error
    missing = [part for part in PARTS if not isinstance(content, dict) or not isinstance(content.get(part), list)]
    if missing:
        has = ", ".join(map(str, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"the annotation file {path} has no list of {' and no list of '.join(missing)}; it holds {has[:200] or 0}"
        )
    for part in PARTS:
        if not all(isinstance(item, dict) for item in content[part]):
            raise ValueError(f"{part} in the annotation file {path} must be a list of objects {{...}}")
    if not content["images"]:
        raise ValueError(f"the annotation file {path} lists no images")
    return content["images"], content["annotations"], content["categories"]


def _sizes(path: Path, images: Sequence[dict[str, Any]]) -> dict[Any, tuple[int, int]]:
    """Return width and height of each image, by id, and make them whole numbers in its entry."""
    sizes: dict[Any, tuple[int, int]] = {}
    for number, image in enumerate(images):
        if missing := [key for key in ("id", "file_name", "width", "height") if key not in image]:
            raise ValueError(f"image {number} in {path} has no {' and no '.join(missing)}: {image}")
        if not isinstance(image["id"], int | str | float):
            raise ValueError(f"the id of image {number} in {path} must be a number or a string, got {image['id']}")
        if image["id"] in sizes:
            raise ValueError(f"two images in {path} have the id {image['id']}")
        width, height = image["width"], image["height"]
        if not all(_is_number(side) and math.isfinite(side) and side == int(side) >= 1 for side in (width, height)):
            raise ValueError(f"the image {image['file_name']} in {path} is {width} x {height} pixels")
        if not isinstance(image["file_name"], str):
            raise ValueError(f"the file_name of image {number} in {path} must be a string, got {image['file_name']}")
        image |= {"width": int(width), "height": int(height)}
        sizes[image["id"]] = (int(width), int(height))
    return sizes


def _choose(path: Path, categories: list[dict[str, Any]], classes: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the categories, by ascending id, or those of certain names."""
    for category in categories:
        if not isinstance(category.get("id"), int) or not isinstance(category.get("name"), str):
            raise ValueError(f"a category in {path} has no id, a whole number, or no name: {category}")
    for key in ("id", "name"):
        values = [category[key] for category in categories]
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"two categories in {path} have the {key} {twice[0]!r}")
    chosen = sorted(categories, key=lambda category: category["id"])
    names = [category["name"] for category in chosen]
    if classes is not None and (isinstance(classes, str) or not classes):
        raise ValueError(f"classes must be names of categories, got {classes!r}")
    for name in classes or ():
        if name not in names:
            raise ValueError(f"classes: {path} has no {name!r}{suggest(name, names, f'; it has {first_few(names)}')}")
    if not chosen:
        raise ValueError(f"the annotation file {path} lists no categories")
    return [category for category in chosen if classes is None or category["name"] in classes]


def _fault(item: Mapping[str, Any], sizes: Mapping[Any, tuple[int, int]], listed: set[int]) -> str:
    """Say why nothing can be learned from an object, its mask aside; nothing if something can."""
    if not isinstance(item.get("image_id"), int | str | float) or item["image_id"] not in sizes:
        return "of images that are not listed"
    if not isinstance(item.get("category_id"), int) or item["category_id"] not in listed:
        return "of categories that are not listed"
    if (item.get("iscrowd") or 0) not in (0, 1):
        return "whose iscrowd is neither 0 nor 1"
    width, height = sizes[item["image_id"]]
    if width * height > MOST_PIXELS:
        return "of images that are listed as too large to be read"
    return _box_fault(item.get("bbox"), width, height)


def _box_fault(box: Any, image_width: int, image_height: int) -> str:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "without a box [x, y, width, height]"
    if not all(map(math.isfinite, box)):
        return "with a box that is not finite"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "with a box of zero or negative size"
    outside = x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0
    return "with a box outside of the image" if outside else ""


def _check_mask(mask: Any, width: int, height: int) -> tuple[str, Any]:
    """Say why nothing can be learned from a mask, nothing if something can; and return its proper part."""
    if not mask:
        return "without a mask", None
    if isinstance(mask, dict) and {"counts", "size"} <= {*mask}:
        if not isinstance(mask["size"], list) or mask["size"] != [height, width]:
            return "with a mask of another size than the image", None
        try:
            empty = not decode_masks([mask], height, width).any()
        except (ValueError, RuntimeError, TypeError):  # faster-coco-eval's, for counts of all kinds
            return "with an RLE that cannot be decoded", None
        return ("without a mask", None) if empty else ("", mask)
    if not isinstance(mask, list) or not all(isinstance(polygon, list) for polygon in mask):
        return "with a mask that is neither polygons nor RLE", None
    proper = [p for p in mask if len(p) >= 6 and len(p) % 2 == 0 and all(_is_number(x) and math.isfinite(x) for x in p)]
    # quick is at least as much, and known sooner
    quick = sum(len(polygon) * (max(polygon) - min(polygon)) for polygon in proper)
    if quick > LONGEST and sum(map(_outline, proper)) > LONGEST:
        fault, inside = f"with a mask whose outline is longer than {LONGEST:,} pixels", []
    else:
        fault = "with a mask without a polygon of three points or more in the image"
        inside = [p for p in proper if min(p[::2]) < width and min(p[1::2]) < height and max(p[::2]) > 0 < max(p[1::2])]
    return "" if inside else fault, inside


def _outline(polygon: list[float]) -> float:
    """Return the steps from pixel to pixel around a polygon."""
    xs, ys = polygon[::2], polygon[1::2]
    ends = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return sum(max(abs(x2 - x1), abs(y2 - y1)) for x1, y1, x2, y2 in ends)


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
