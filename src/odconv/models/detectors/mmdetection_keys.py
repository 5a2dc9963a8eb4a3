"""The names and the order of the classes in mmdetection's checkpoints of Faster and Mask R-CNN, translated to ours."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from odconv.checkpoints import Checkpoint

NAMES = (
    (r"backbone\.(?:features\.)?", "backbone.body."),
    (r"neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"roi_head\.mask_head\.convs\.(\d+)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
)
"""Beginning of a key there (a pattern) and here."""

CLASSIFIER = re.compile(r"backbone\.(fc|classifier)\.")
"""What a backbone carries along without using it."""


def is_checkpoint(state: Mapping[str, Tensor]) -> bool:
    """Tell mmdetection's checkpoint of a detector, with a neck and a head, from others."""
    return any(key.startswith("neck.") for key in state) and any(
        key.startswith(("rpn_head.", "roi_head.", "bbox_head.")) for key in state
    )


def read_meta(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what mmdetection noted beside the weights of a checkpoint: `CLASSES`, `config` and so on."""
    meta = checkpoint.content.get("meta")
    return meta if isinstance(meta, dict) else {}


def check_style(checkpoint: Checkpoint) -> None:
    """Raise a ValueError for a checkpoint whose ResNet is Caffe's: other strides, BGR, another mean."""
    if re.search(r"style\s*=\s*['\"]caffe['\"]", str(read_meta(checkpoint).get("config", ""))):
        raise ValueError(
            f"{checkpoint.path} holds a detector on a ResNet of style 'caffe', which has its strides on the 1x1 "
            "convolutions and takes images in BGR; only style 'pytorch' is known"
        )


def class_names(checkpoint: Checkpoint, count: int) -> list[str] | None:
    """Return the names of the classes that a checkpoint notes; None where they are not `count` names."""
    noted = read_meta(checkpoint).get("CLASSES")
    if not isinstance(noted, list | tuple) or len(noted) != count or not all(isinstance(name, str) for name in noted):
        return None
    return list(noted)


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors of a checkpoint our names and our order of the classes.

    There the background is the last class and has neither box nor mask; here it is class 0 and has both, never read:
    they are zeros. Class c there is label c + 1 here. Keys that have no counterpart keep their names.
    """
    return {rename(key): with_background(key, tensor) for key, tensor in state.items() if not CLASSIFIER.match(key)}


def rename(key: str) -> str:
    """Our name for a tensor."""
    for pattern, ours in NAMES:
        renamed, found = re.subn(f"^{pattern}", ours, key)
        if found:
            return renamed
    return key


def with_background(key: str, tensor: Tensor) -> Tensor:
    """Put the background's rows first."""
    if key.startswith("roi_head.bbox_head.fc_cls."):
        return torch.cat([tensor[-1:], tensor[:-1]])
    if key.startswith("roi_head.bbox_head.fc_reg."):
        return torch.cat([torch.zeros_like(tensor[:4]), tensor])
    if key.startswith("roi_head.mask_head.conv_logits."):
        return torch.cat([torch.zeros_like(tensor[:1]), tensor])
    return tensor
