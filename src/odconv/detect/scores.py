"""COCO's scores of detections, by faster-coco-eval."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_masks
from torch import Tensor

from odconv.detect.coco import Annotations

METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""Average precision: over IoU 0.5 to 0.95, at 0.5, at 0.75; of objects below 32 x 32, below 96 x 96, and above."""

Result = dict[str, Any]
"""A detection in COCO's format: image_id, category_id, score, `bbox` [x, y, width, height], and perhaps `segmentation`,
a compressed RLE."""


def describe_detections(
    detections: Mapping[str, Tensor], image_id: Any, categories: Sequence[int | None]
) -> list[Result]:
    """Put what a detector found on an image into COCO's format.

    Args:
        detections: `boxes` (N, 4), `labels` (N), `scores` (N) and perhaps `masks` (N, 1, H, W) of probabilities.
        image_id: the image's id.
        categories: the id of each class, that of label 1 first; None for one that shall be left out.
    """
    wanted = [categories[label - 1] is not None for label in detections["labels"].tolist()]
    detections = {name: values[wanted] for name, values in detections.items()}
    boxes = detections["boxes"].float()
    corners = boxes[:, :2].tolist()
    sides = (boxes[:, 2:] - boxes[:, :2]).tolist()
    results: list[Result] = [
        {"image_id": image_id, "category_id": categories[label - 1], "bbox": [*corner, *side], "score": score}
        for corner, side, label, score in zip(
            corners, sides, detections["labels"].tolist(), detections["scores"].tolist(), strict=True
        )
    ]
    if "masks" in detections:
        masks = (detections["masks"][:, 0] > 0.5).byte().cpu().numpy()
        for result, mask in zip(results, masks, strict=True):
            rle = coco_masks.encode(np.asfortranarray(mask[:, :, None]))[0]
            result["segmentation"] = {"size": [*map(int, rle["size"])], "counts": rle["counts"].decode()}
    return results


def score(
    annotations: Annotations, results: Iterable[Result], image_ids: Iterable[Any], masks: bool = False
) -> dict[str, Any]:
    """Score detections against annotations.

    Args:
        annotations: what is on the images.
        results: detections in COCO's format.
        image_ids: the images that were looked at; others do not count.
        masks: whether to score masks besides boxes.

    Returns:
        METRICS in % of the boxes, and of the masks with "mask_" before the name; None where nothing of a size is
        there to be found. "classes": the "ap", and "mask_ap", of each class by its name.
    """
    results, ids = list(results), sorted(image_ids)
    scores: dict[str, Any] = {}
    classes: dict[str, dict[str, float | None]] = {name: {} for name in annotations.classes}
    for prefix, kind in (("", "bbox"), *((("mask_", "segm"),) if masks else ())):
        values, per_class = _score(annotations, results, ids, kind)
        scores |= {prefix + name: value for name, value in zip(METRICS, values, strict=True)}
        for name, value in zip(annotations.classes, per_class, strict=True):
            classes[name][f"{prefix}ap"] = value
    return {**scores, "classes": classes}


def _score(
    annotations: Annotations, results: Sequence[Result], image_ids: Sequence[Any], kind: str
) -> tuple[list[float | None], list[float | None]]:
    """Return METRICS, and the average precision of each class."""
    wanted = {"bbox": ("bbox",), "segm": ("segmentation",)}[kind]  # without a box, a mask's own area counts
    objects = (item for on_image in annotations.objects for item in on_image)
    truth = COCO(
        {
            "images": annotations.images,
            "categories": annotations.categories,
            "annotations": [
                item | {"id": number} for number, item in enumerate(objects, 1)
            ],  # an id of 0 never matches
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
