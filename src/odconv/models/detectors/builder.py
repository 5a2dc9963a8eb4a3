"""Detectors: torchvision's Faster R-CNN, Mask R-CNN and RetinaNet on any network of the zoo."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from odconv.checkpoints import Checkpoint, Weights, find_checkpoint
from odconv.conversion.convert import options_of
from odconv.layers import ODConv2d, set_temperature, try_temperature
from odconv.models.build import (
    check_layer_options,
    create_model,
    load_all_but_classifier,
    make_dynamic,
    split_name,
)
from odconv.models.detectors import mmdetection_keys
from odconv.models.detectors.weights import load_detector
from odconv.system.text import suggest


class Detector(NamedTuple):
    """A detector: torchvision's class, its argument of anchors, their octaves, and how its thresholds' names begin."""

    builder: str
    anchors: str
    octaves: tuple[float, ...]
    prefix: str


DETECTORS = {
    "faster_rcnn": Detector("FasterRCNN", "rpn_anchor_generator", (1,), "box_"),
    "mask_rcnn": Detector("MaskRCNN", "rpn_anchor_generator", (1,), "box_"),
    "retinanet": Detector("RetinaNet", "anchor_generator", (1, 2 ** (1 / 3), 2 ** (2 / 3)), ""),
}
CONVENTIONS = ("torchvision", "mmdetection")


def create_detector(
    name: str,
    backbone: str | nn.Module,
    *,
    kernel_num: int | None = None,
    reduction: float | None = None,
    layer_options: dict[str, Any] | None = None,
    num_classes: int = 81,
    weights: Weights | None = None,
    weights_backbone: Weights | None = None,
    warm_start: bool = False,
    new_predictor: bool = False,
    frozen_stages: int = 1,
    norm_eval: bool = True,
    temperature: float | None = None,
    masked_pool: bool = False,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    detections_per_image: int = 100,
    conventions: str | None = None,
    **options: Any,
) -> nn.Module:
    """Build a detector with a feature pyramid on a network of the zoo.

    The detector takes a list of images, (3, H, W) in 0 .. 1, of any sizes. In training mode it takes a list of targets
    besides, dicts of `boxes` (N, 4) in pixels (x1, y1, x2, y2), `labels` (N) and, for Mask R-CNN, `masks` (N, H, W),
    and returns a dict of losses. In evaluation mode it returns for each image a dict of `boxes`, `labels`, `scores`
    and, from Mask R-CNN, `masks` (N, 1, H, W) with probabilities; a dynamic backbone then sees one image at a time, so
    that what is found on an image does not depend on the padding that others make necessary; but see `masked_pool`.

    Args:
        name: "faster_rcnn", "mask_rcnn" or "retinanet".
        backbone: a name of :func:`odconv.list_models`; or a ResNet, MobileNetV2 or ConvNeXt that is there already,
            after :func:`odconv.convert` for example. It becomes part of the detector, without its classifier.
        kernel_num: number of kernels n of a dynamic backbone that is given by name; see :func:`odconv.create_model`.
        reduction: width of its attention's hidden layer as a share of the channels.
        layer_options: further options of its dynamic layers: `init`, `norm` and so on. Default: none.
        num_classes: classes with the background, at least 2, as torchvision counts them: label 0 is the background,
            labels 1 .. num_classes - 1 are the objects. Default 81, for the 80 classes of COCO.
        weights: a checkpoint of the whole detector, ours, torchvision's or mmdetection's: a path, or a name on the
            Hugging Face Hub.
        weights_backbone: a classification checkpoint for the backbone, whatever `create_model` can load; its classifier
            is ignored.
        warm_start: `weights_backbone` are those of the static network of the same name; the dynamic one starts from
            them, see :func:`odconv.convert`.
        new_predictor: leave the last layers, which tell the classes, out of `weights`: for other classes.
        frozen_stages: how many of the backbone's four stages are not trained, 0 .. 4. Default 1: the stem and the
            first stage (`layer1` of a ResNet, `features` 0 to 3 of a MobileNetV2).
        norm_eval: keep the backbone's batch norm, the attentions' included, in evaluation mode while training. Default
            True; its weights and biases are trained where their stage is. That of frozen stages always stays there.
        temperature: temperature of the attentions, above 0. Default: what `weights` or `weights_backbone` record or
            the backbone has, else 1, and 5 after a warm start.
        masked_pool: let the attentions pool over the images alone, not over the padding of a batch, in training as in
            evaluation, which then takes whole batches. Default False, as published.
        min_size: length in pixels to which the shorter side of an image is resized; of several one is drawn for each
            image in training, and the last serves in evaluation. Default 800.
        max_size: limit of the longer side in pixels, which goes before. Default 1333.
        anchor_sizes: sides of the square anchors in pixels, for the five levels of the pyramid. Ratios are 0.5, 1 and
            2; RetinaNet adds sizes of one and two thirds of an octave more.
        score_threshold: detections with a score up to this are dropped. Default 0.05.
        nms_threshold: overlap (IoU) above which the lesser of two detections of a class is dropped. Default 0.5.
        detections_per_image: how many are kept at most. Default 100.
        conventions: "torchvision" or "mmdetection": whose arithmetic of anchors, pooling, boxes, image sizes, masks,
            matches and losses is used, and whose first draw of neck and heads. Default: what `weights` record;
            mmdetection's for its own files, else torchvision's.
        **options: further arguments of torchvision's class, `rpn_post_nms_top_n_test` for example.

    Returns:
        A `FasterRCNN`, `MaskRCNN` or `RetinaNet`, a subclass of torchvision's, in training mode, with its names
        of parameters.

    Raises:
        ValueError: an unknown name (the nearest are listed), an argument out of range, weights that do not fit, or
            mmdetection's conventions for a RetinaNet.
        TypeError: an option that torchvision's class does not have.
        FileNotFoundError, OSError: weights that cannot be read.
        ImportError: torchvision is not installed.
    """
    sizes = [min_size] if isinstance(min_size, int) else list(min_size)
    check_sizes(sizes, max_size, anchor_sizes)
    check_choices(name, num_classes, frozen_stages, conventions)
    check_weights(weights, weights_backbone, new_predictor)
    checkpoint = None if weights is None else find_checkpoint(weights)
    conventions = conventions or find_conventions(checkpoint)
    check_conventions(name, conventions)

    network = build_network(backbone, kernel_num, reduction, layer_options or {}, weights_backbone, warm_start)
    if temperature is not None:
        try_temperature(network, temperature)

    from odconv.models.detectors import networks
    from odconv.models.detectors.backbone import Pyramid

    detector = DETECTORS[name]
    builder = getattr(networks, detector.builder)
    check_options(builder.__mro__[2], options)
    chosen = {
        "num_classes": num_classes,
        "min_size": sizes,
        "max_size": max_size,
        detector.anchors: make_anchors(anchor_sizes, detector.octaves),
        f"{detector.prefix}score_thresh": score_threshold,
        f"{detector.prefix}nms_thresh": nms_threshold,
        f"{detector.prefix}detections_per_img": detections_per_image,
    }
    model: Any = builder(Pyramid(network, name == "retinanet", frozen_stages, norm_eval), **chosen | options)
    model.masked_pool = masked_pool
    follow(model, conventions)
    if checkpoint is not None:
        load_detector(model, checkpoint, new_predictor)
        if temperature is not None:
            set_temperature(model, temperature)
    return model


def follow(model: Any, conventions: str) -> None:
    """Let a detector compute as its conventions say, with exact boxes."""
    from odconv.models.detectors.boxes import FineCoder, fix_strides, set_coder

    set_coder(model, FineCoder)
    fix_strides(model)
    if conventions == "mmdetection":
        from odconv.models.detectors.conventions import adopt

        adopt(model)


def check_conventions(name: str, conventions: str) -> None:
    """Raise a ValueError for conventions that are not known for a detector."""
    if conventions == "mmdetection" and name == "retinanet":
        raise ValueError(
            "mmdetection's conventions and checkpoints are known for faster_rcnn and mask_rcnn, not retinanet"
        )


def make_anchors(sizes: Sequence[int], octaves: Sequence[float]) -> Any:
    """Return torchvision's generator of anchors for levels with these sizes, each in all octaves."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    scaled = tuple(tuple(int(size * octave) for octave in octaves) for size in sizes)
    return AnchorGenerator(scaled, ((0.5, 1.0, 2.0),) * len(sizes))


def check_choices(name: str, num_classes: int, frozen_stages: int, conventions: str | None) -> None:
    """Raise a ValueError for a detector that there is not."""
    if name not in DETECTORS:
        raise ValueError(f"unknown detector {name!r}{suggest(name, DETECTORS, known(DETECTORS))}")
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes must be an int of at least 2, the background and one class, got {num_classes!r}")
    if frozen_stages not in range(5):
        raise ValueError(f"frozen_stages must be 0, 1, 2, 3 or 4, got {frozen_stages!r}")
    if conventions not in (None, *CONVENTIONS):
        raise ValueError(f"conventions must be one of {CONVENTIONS} or None, got {conventions!r}")


def check_weights(weights: Weights | None, weights_backbone: Weights | None, new_predictor: bool) -> None:
    """Raise a ValueError for weights that do not go together."""
    if new_predictor and weights is None:
        raise ValueError("new_predictor needs weights, those of a detector for other classes")
    if weights is not None and weights_backbone is not None:
        raise ValueError("weights and weights_backbone must not both be given: weights has a backbone")


def check_sizes(min_sizes: Sequence[int], max_size: int, anchor_sizes: Sequence[int]) -> None:
    """Raise a ValueError for sizes of images or anchors that cannot be."""
    if not min_sizes or not 1 <= min(min_sizes) <= max(min_sizes) <= max_size:
        given = min_sizes[0] if len(min_sizes) == 1 else [*min_sizes]
        raise ValueError(f"min_size and max_size must be 1 <= min_size <= max_size, got {given} and {max_size}")
    if len(anchor_sizes) != 5 or min(anchor_sizes) <= 0:
        raise ValueError(f"anchor_sizes must be five positive numbers, one a level, got {anchor_sizes}")


def find_conventions(checkpoint: Checkpoint | None) -> Literal["torchvision", "mmdetection"]:
    """Return with whose arithmetic a checkpoint was trained."""
    if checkpoint is None:
        return "torchvision"
    published = mmdetection_keys.is_checkpoint(checkpoint.state)
    return checkpoint.options.get("conventions", "mmdetection" if published else "torchvision")


def build_network(
    backbone: str | nn.Module,
    kernel_num: int | None,
    reduction: float | None,
    layer_options: dict[str, Any],
    weights: Weights | None,
    warm_start: bool,
) -> nn.Module:
    """Return the network whose maps the pyramid reads, with its weights."""
    if warm_start and weights is None:
        raise ValueError(
            "warm_start needs weights_backbone, those of the static network; without them it must be False, with "
            "weights of a detector too"
        )
    if warm_start and not isinstance(backbone, str):
        raise ValueError("warm_start needs a backbone that is given by name, got a network")
    if not isinstance(backbone, str):
        if kernel_num is not None or reduction is not None or layer_options:
            raise ValueError(
                "kernel_num, reduction and layer_options must be None for a backbone that is built already, got "
                f"{kernel_num}, {reduction} and {layer_options or None}"
            )
        network = backbone
    elif warm_start:
        network = create_model(split_name(backbone)[1])
    else:
        check_layer_options(backbone, layer_options)  # what a file says must not be any argument of create_model
        network = create_model(backbone, kernel_num=kernel_num, reduction=reduction, **layer_options)
    if weights is not None:
        load_all_but_classifier(network, weights)
    if warm_start:
        make_dynamic(network, str(backbone), kernel_num, reduction, warm_start, **layer_options)
    return network


def check_options(builder: type, options: dict[str, Any]) -> None:
    """Raise a TypeError for an option that torchvision's class does not name."""
    options_known = [name for name in inspect.signature(builder).parameters if name not in ("backbone", "kwargs")]
    for option in options:
        if option not in options_known:
            hint = suggest(option, options_known, known(options_known))
            if option in options_of(ODConv2d):
                hint = f"; layers of the backbone have it: layer_options={{{option!r}: ...}}"
            raise TypeError(f"create_detector has no option {option!r}, nor has {builder.__name__}{hint}")


def known(names: Iterable[str]) -> str:
    """Return what an error says of the names that there are."""
    return f"; known are {', '.join(names)}"
