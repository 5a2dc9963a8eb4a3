"""COCO's scores of detections, by faster-coco-eval."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor
from torchvision.ops import box_convert

from odconv.app.detect.coco import Annotations
from odconv.app.detect.masks import encode_masks

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""Average precision: over IoU 0.5 to 0.95, at 0.5, at 0.75; of objects below 32 x 32, below 96 x 96, and above."""

Result = dict[str, Any]
"""A detection in COCO's format: image_id, category_id, score, `bbox` [x, y, width, height], and perhaps `segmentation`,
a compressed RLE."""


def describe_detections(
    detections: Mapping[str, Tensor], image_id: Any, categories: Sequence[int | None]
) -> list[Result]:
    """Put `boxes` (N, 4), `labels`, `scores` and perhaps `masks` (N, 1, H, W) of an image into COCO's format.

    `categories` are the ids of the classes, that of label 1 first; None for one that shall be left out.
    """
    # a RetinaNet may answer with label 0, which stands for nothing
    wanted = [label > 0 and categories[label - 1] is not None for label in detections["labels"].tolist()]
    detections = {name: values[wanted] for name, values in detections.items()}
    boxes = box_convert(detections["boxes"].float(), "xyxy", "xywh")
    columns = (values.tolist() for values in (boxes, detections["labels"], detections["scores"]))
    results: list[Result] = [
        {"image_id": image_id, "category_id": categories[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(*columns, strict=True)
    ]
    if "masks" in detections:
        for result, rle in zip(results, encode_masks(detections["masks"][:, 0] >= 0.5), strict=True):
            result["segmentation"] = rle
    return results


def score(
    annotations: Annotations, results: Iterable[Result], image_ids: Iterable[Any], masks: bool = False
) -> dict[str, Any]:
    """Score detections in COCO's format against annotations, on the images that were looked at.

    Returns:
        METRICS in % of the boxes, and of the masks with "mask_" before the name; None where nothing of a size is
        there to be found. "classes": the "ap", and "mask_ap", of each class by its name.
    """
    # images by their number: their ids may be anything, and the C++ code wants small whole numbers
    number = {image["id"]: place for place, image in enumerate(annotations.images, 1)}
    results = [result | {"image_id": number[result["image_id"]]} for result in results]
    ids = [number[image_id] for image_id in image_ids]
    scores: dict[str, Any] = {}
    classes: dict[str, dict[str, float | None]] = {name: {} for name in annotations.classes}
    for prefix, kind in (("", "bbox"), *((("mask_", "segm"),) if masks else ())):
        values, per_class = _score(annotations, results, ids, kind)
        scores |= {prefix + name: value for name, value in zip(METRICS, values, strict=True)}
        for name, value in zip(annotations.classes, per_class, strict=True):
            classes[name][f"{prefix}ap"] = value
    return {**scores, "classes": classes}


def _score(
    annotations: Annotations, results: Sequence[Result], image_ids: Sequence[int], kind: str
) -> tuple[list[float | None], list[float | None]]:
    """Return METRICS, and the average precision of each class."""
    wanted = {"bbox": ("bbox",), "segm": ("segmentation",)}[kind]  # without a box, a mask's own area counts
    objects = (item | {"image_id": i} for i, found in enumerate(annotations.objects, 1) for item in found)
    truth = COCO(
        {
            "images": [image | {"id": number} for number, image in enumerate(annotations.images, 1)],
            "categories": annotations.categories,
            # an id of 0 would never match
            "annotations": [item | {"id": number} for number, item in enumerate(objects, 1)],
        }
    )
    found = truth.loadRes(
        [{key: result[key] for key in ("image_id", "category_id", "score", *wanted)} for result in results]
    )
    evaluation = COCOeval_faster(truth, found, kind)
    evaluation.params.imgIds = list(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all sizes, 100 detections
    per_class = [values[values > -1] for values in np.moveaxis(precision, 2, 0)]
    return (
        [_percent(value) for value in evaluation.all_stats[: len(METRICS)]],
        [_percent(values.mean()) if values.size else None for values in per_class],
    )


def _percent(value: float) -> float | None:
    return round(100 * float(value), 4) if value > -1 else None
