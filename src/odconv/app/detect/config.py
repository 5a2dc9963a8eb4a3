"""The options of training a detector: one typed, documented field for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from odconv.app.engine.config import RunConfig

DetectorName: TypeAlias = Literal["faster_rcnn", "mask_rcnn", "retinanet"]
Conventions: TypeAlias = Literal["torchvision", "mmdetection"]
Augment: TypeAlias = Literal["flip", "strong", "crop", "none"]


@dataclass(frozen=True, kw_only=True)
class DetectConfig(RunConfig):
    """Options of `odconv detect train`; the defaults are those of the published detectors."""

    detector: DetectorName
    """Detector: faster_rcnn, mask_rcnn or retinanet."""
    weights: str | None = None
    """File of weights of a whole detector to start from."""
    new_predictor: bool = False
    """Leave the last layers, which tell the classes, out of weights: for data with other classes."""
    weights_backbone: str | None = None
    """File of weights of a classifier, for the backbone to start from."""
    warm_start: bool = False
    """weights_backbone are those of the static network of the same name, from which the dynamic one starts."""
    frozen_stages: int = 1
    """Stages of the backbone that are not trained, 0 to 4; the stem goes with the first."""
    norm_eval: bool = True
    """Keep the batch norm of the backbone in evaluation mode."""
    temperature: float | None = None
    """Temperature of the attentions; default: that of the weights, else 1, and 5 after a warm start."""
    blend_epochs: int = 0
    """Epochs in which the blend of KernelWarehouse's layers falls from 1 to 0, with every step; 0: it is 0 from the
    start."""
    masked_pool: bool = False
    """Let attentions pool over the images alone, not over the padding of a batch; published detectors do not."""
    conventions: Conventions | None = None
    """Arithmetic of boxes and masks: torchvision or mmdetection; default: that of weights, else torchvision."""
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512)
    """Sides of the anchors in pixels, for the five levels of the pyramid."""
    min_size: int | Sequence[int] = 800
    """Pixels to which the shorter side is resized; of several one is drawn in training, the last is for evaluation."""
    max_size: int = 1333
    """Limit of the longer side in pixels."""
    score_threshold: float = 0.05
    """Detections with a score up to this are dropped."""
    nms_threshold: float = 0.5
    """Overlap above which the lesser of two detections of a class is dropped."""
    detections_per_image: int = 100
    """Detections that are kept at most."""
    options: dict[str, Any] | None = None
    """Further arguments of torchvision's class, such as {rpn_post_nms_top_n_train: 1000}."""

    data: str
    """Folder of a data set in COCO's format, to which the four below are relative."""
    train_images: str = "train2017"
    """Folder of the training images."""
    train_annotations: str = "annotations/instances_train2017.json"
    """Annotations of the training images."""
    val_images: str = "val2017"
    """Folder of the images for evaluation."""
    val_annotations: str = "annotations/instances_val2017.json"
    """Annotations of the images for evaluation."""
    classes: str | Sequence[str] | None = None
    """Names of the classes to detect, such as cat,dog; default: all of the training annotations."""
    negatives: bool = True
    """Train on images without an object, too."""
    group: bool = True
    """Make batches of images that are all wider than high, or all not."""
    augment: Augment = "flip"
    """Augmentation: flip (left and right), strong (flip, colours, random parts), crop (flip, large parts) or none."""

    epochs: int = 12
    batch_size: int = 16
    test_batch: int = 8
    lr: float = 0.02
    schedule: Sequence[int] = (8, 11)
    warmup_steps: int = 500
    """Steps over which the learning rate rises in a straight line."""
    warmup_factor: float = 0.001
    """Share of the learning rate at the first of them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", names(self.classes))
        super().__post_init__()


def names(classes: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return names that may be in one word, with commas between."""
    return tuple(classes.split(",")) if isinstance(classes, str) else None if classes is None else tuple(classes)
