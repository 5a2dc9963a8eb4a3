"""A trained detector: from a checkpoint of ours alone, from others' with a description of the detector."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import nn

from odconv.app.detect.config import DetectConfig, names
from odconv.app.engine.config import check
from odconv.app.engine.layer_options import layer_options
from odconv.checkpoints import Checkpoint, find_checkpoint, malformed
from odconv.models.build import check_described, norm_told
from odconv.models.detectors import mmdetection_keys
from odconv.models.detectors.builder import create_detector

OUTPUTS = {
    "roi_heads.box_predictor.cls_score.bias": 1,
    "roi_head.bbox_head.fc_cls.bias": 1,  # mmdetection
    "head.classification_head.cls_logits.bias": 9,
}
"""Tensors whose length is the number of classes, and how many times that: the anchors of a place."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a file of weights may leave unsaid of its detector; None: what it says, else the default."""

    detector: str | None = None
    """faster_rcnn, mask_rcnn or retinanet; default: what the checkpoint says."""
    arch: str | None = None
    """Network of its backbone, such as od_resnet50; default: what the checkpoint says."""
    kernel_num: int | None = None
    """Kernels of its dynamic layers; default: what the checkpoint says, else that of the network."""
    reduction: float | None = None
    """Reduction of its attentions; default: what the checkpoint says, else that of the network."""
    conventions: str | None = None
    """torchvision or mmdetection; default: what the checkpoint says or is."""
    temperature: float | None = None
    """Temperature of the attentions; default: what the checkpoint says, else 1."""
    masked_pool: bool | None = None
    """Whether its attentions pool over the images alone; default: what the checkpoint says, else False."""
    classes: str | Sequence[str] | None = None
    """Names of its classes in their order, such as cat,dog; default: what the checkpoint says, else those of COCO for
    80 or, by category id, for 90, else class 1 and so on."""
    anchor_sizes: Sequence[int] | None = None
    """Sides of its anchors in pixels, for the five levels; default: what the checkpoint says, else 32 to 512."""
    min_size: int | None = None
    """Pixels of the shorter side; default: what the checkpoint says, else 800."""
    max_size: int | None = None
    """Limit of the longer side in pixels; default: what the checkpoint says, else 1333."""
    score_threshold: float | None = None
    """Detections with a score up to this are dropped; default: what the checkpoint says, else 0.05."""
    nms_threshold: float | None = None
    """Overlap above which the lesser of two detections of a class is dropped; default: what the checkpoint says, else
    0.5."""
    detections_per_image: int | None = None
    """Detections that are kept at most; default: what the checkpoint says, else 100."""
    options: dict[str, Any] | None = None
    """Further arguments of torchvision's class; default: what the checkpoint says."""


NAMES = tuple(field.name for field in fields(Description))
PASSED = tuple(name for name in NAMES if name not in ("detector", "arch", "classes", "options"))
"""Arguments of `create_detector` by the name that they have there."""


class RestoredDetector(NamedTuple):
    """A trained detector, in evaluation mode.

    `classes` are their names, that of label 1 first, `categories` their ids in COCO's format, `chosen` those that the
    training took of the classes in its annotations, None for all.
    """

    model: nn.Module
    name: str
    classes: list[str]
    categories: list[int]
    chosen: Sequence[str] | None = None


def build(config: DetectConfig, classes: int, weights: Checkpoint | None = None) -> nn.Module:
    """Build the detector of a run for so many classes, with the weights to start from."""
    return create_detector(
        config.detector,
        config.arch,
        num_classes=classes + 1,
        weights=weights or config.weights,
        new_predictor=config.new_predictor,
        weights_backbone=config.weights_backbone,
        warm_start=config.warm_start,
        frozen_stages=config.frozen_stages,
        norm_eval=config.norm_eval,
        layer_options=layer_options(config),
        **{name: getattr(config, name) for name in PASSED},
        **config.options or {},
    )


def restore(weights: str, **description: Any) -> RestoredDetector:
    """Build the detector of a checkpoint and load it; the fields of :class:`Description` say what the file does not.

    It is a ValueError if `detector` or `arch` is needed, or a number is out of range, or the weights do not fit.
    """
    given = {name: value for name, value in vars(Description(**description)).items() if value is not None}
    check(given)
    checkpoint = find_checkpoint(weights)
    with malformed(checkpoint.path):
        return _restore(checkpoint, given, given.pop("classes", None))


def _restore(checkpoint: Checkpoint, given: dict[str, Any], classes: str | Sequence[str] | None) -> RestoredDetector:
    path, described, notes = checkpoint.path, checkpoint.options, checkpoint.notes
    if described and "detector" not in described:
        raise ValueError(f"{path} is no checkpoint of a detector, but of the classifier {described.get('arch')}")
    described |= given
    if missing := [name for name in ("detector", "arch") if name not in described]:
        raise ValueError(f"{' and '.join(missing)} must be given, since {path} holds weights alone")
    check(described)
    outputs = _outputs(checkpoint)
    backbone = {name: described[name] for name in ("kernel_num", "reduction") if name in described}
    layers = norm_told(described["arch"], checkpoint.state) | (described.get("layer_options") or {})
    check_described(path, described["arch"], **backbone, **layers)
    titles, categories = (notes["classes"], notes["categories"]) if notes else coco_classes(outputs)
    if not notes and (noted := mmdetection_keys.class_names(checkpoint, outputs - 1)):
        known = dict(zip(titles, categories, strict=True))
        titles, categories = noted, [known.get(name, number) for number, name in enumerate(noted, 1)]
    if named := names(classes):
        if len(named) != outputs - 1:
            raise ValueError(f"classes must be {outputs - 1} names, as many as {path} has, got {len(named)}")
        titles = list(named)
    model = create_detector(
        described["detector"],
        described["arch"],
        num_classes=outputs,
        weights=checkpoint,
        layer_options=layers,
        **{name: described[name] for name in PASSED if name in described},
        **described.get("options") or {},
    )
    title = f"{described['detector']} on {described['arch']}"
    return RestoredDetector(model.eval(), title, titles, categories, described.get("classes"))


def coco_classes(outputs: int) -> tuple[list[str], list[int]]:
    """Return the names and the category ids of COCO's classes, for a detector of so many outputs.

    With the background, 81 outputs are the 80 classes in order, 91 are category ids, as torchvision has them.
    """
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    listed = list(enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))[1:]
    if outputs == 81:
        listed = [(number, name) for number, name in listed if name != "N/A"]
    elif outputs != 91:
        listed = [(number, f"class {number}") for number in range(1, outputs)]
    return [name for _, name in listed], [number for number, _ in listed]


def _outputs(checkpoint: Checkpoint) -> int:
    """Return the number of classes, with the background, in the checkpoint of a detector."""
    state = checkpoint.state
    for key, anchors in OUTPUTS.items():
        if key in state:
            return len(state[key]) // anchors
    raise ValueError(f"{checkpoint.path} holds no detector of those known, which have one of {', '.join(OUTPUTS)}")
