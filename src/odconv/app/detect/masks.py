"""COCO's masks, by faster-coco-eval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_masks
from torch import Tensor


def decode_masks(masks: Sequence[Any], height: int, width: int) -> Tensor:
    """Return masks, polygons or RLE, as bytes of 0 and 1 (N, height, width)."""
    decoded = np.zeros((len(masks), height, width), dtype=np.uint8)
    for place, mask in zip(decoded, masks, strict=True):
        place[:] = coco_masks.decode(coco_masks.segmToRle(mask, width, height))
    return torch.from_numpy(decoded)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Return masks (N, height, width) of 0 and 1 as compressed RLE, as JSON takes it."""
    encoded = [coco_masks.encode(np.asfortranarray(mask[:, :, None]))[0] for mask in masks.byte().cpu().numpy()]
    return [{"size": [*map(int, rle["size"])], "counts": rle["counts"].decode()} for rle in encoded]
