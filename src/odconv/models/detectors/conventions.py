"""The arithmetic of mmdetection's Faster and Mask R-CNN where torchvision's differs, as parts that take its place.

Written from its documented configuration: `AnchorGenerator` (strides 4 to 64, scale 8, centre offset 0),
`DeltaXYWHBBoxCoder` (clip 16/1000), `SingleRoIExtractor` (finest scale 56, aligned RoI-align, sampling ratio 0),
`Resize` with `keep_ratio`, and pasting of masks by bilinear sampling at the centres of the pixels.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import MultiScaleRoIAlign, roi_align

from odconv.models.detectors import boxes
from odconv.models.detectors.boxes import FineCoder, set_coder
from odconv.models.detectors.mmdetection_losses import learn_as_mmdetection

STRIDES = (*boxes.STRIDES, 64)
"""Pixels of the image for one of each level of the pyramid."""

FINEST_SCALE = 56
"""Boxes of less than twice this size, in pixels, are pooled from the finest level."""


class Anchors(AnchorGenerator):
    """Anchors that are not rounded, a fixed stride apart."""

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        """Return the anchors at the origin, one a row: (x1, y1, x2, y2), by ratio, then by scale."""
        size = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        width, height = ((1 / root)[:, None] * size).flatten(), (root[:, None] * size).flatten()
        return torch.stack([-width, -height, width, height], dim=1) / 2

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """Return the anchors of each level; `strides`, inferred from the size of the maps, are not used."""
        fixed = [[torch.tensor(stride, device=strides[0][0].device)] * 2 for stride in STRIDES]
        return super().grid_anchors(grid_sizes, fixed)


class Coder(FineCoder):
    """Boxes from deltas whose change of size is limited on both sides, not only above."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Return the boxes (B, 4 K) that the deltas `rel_codes` (B, 4 K) make of `boxes` (B, 4)."""
        free = -math.inf
        lowest = [free, free, -self.bbox_xform_clip * self.weights[2], -self.bbox_xform_clip * self.weights[3]]
        codes = rel_codes.unflatten(1, (-1, 4)).maximum(rel_codes.new_tensor(lowest))
        return super().decode_single(codes.flatten(1), boxes)


class Pool(MultiScaleRoIAlign):
    """Aligned RoI-align with as many samples as a bin has pixels, from the level that a box's size chooses."""

    def __init__(self, output_size: int) -> None:
        super().__init__(["0", "1", "2", "3"], output_size, sampling_ratio=0)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool the boxes, (N, 4) in pixels for each image, to (sum of N, C, size, size)."""
        maps = [x[name] for name in self.featmap_names]
        images = torch.cat([torch.full_like(b[:, :1], image) for image, b in enumerate(boxes)])
        regions = torch.cat([images, torch.cat(boxes)], dim=1)
        size = ((regions[:, 3] - regions[:, 1]) * (regions[:, 4] - regions[:, 2])).sqrt()
        levels = (size / FINEST_SCALE + 1e-6).log2().floor().clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (features, stride) in enumerate(zip(maps, STRIDES, strict=False)):
            chosen = torch.where(levels == level)[0]
            pooled[chosen] = roi_align(features, regions[chosen], self.output_size, 1 / stride, 0, aligned=True)
        return pooled


class Transform(GeneralizedRCNNTransform):
    """Images whose new size is rounded to the nearest pixel, not down, and masks pasted by bilinear sampling."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image (C, H, W), and the boxes and masks of its target, to the sizes given."""
        old = tuple(image.shape[-2:])
        short = self.torch_choice(list(self.min_size)) if self.training else self.min_size[-1]
        scale = min(short / min(old), self.max_size / max(old))
        new = [max(1, int(side * scale + 0.5)) for side in old]
        image = F.interpolate(image[None], size=new, mode="bilinear", align_corners=False)[0]
        if target is not None:
            target["boxes"] = resize_boxes(target["boxes"], list(old), new)
            if "masks" in target:
                target["masks"] = F.interpolate(target["masks"][:, None].float(), size=new)[:, 0].byte()
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Bring detections back to the size of the original images."""
        if self.training:
            return result
        for detections, shape, original in zip(result, image_shapes, original_image_sizes, strict=True):
            detections["boxes"] = resize_boxes(detections["boxes"], list(shape), list(original))
            if "masks" in detections:
                detections["masks"] = paste(detections["masks"], detections["boxes"], *original)
        return result


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Draw masks (N, 1, m, m) into their boxes (N, 4) of an image: (N, 1, height, width)."""
    pasted = masks.new_zeros(len(masks), 1, height, width)
    y = torch.arange(height, device=boxes.device, dtype=boxes.dtype) + 0.5
    x = torch.arange(width, device=boxes.device, dtype=boxes.dtype) + 0.5
    for mask, box, image in zip(masks, boxes, pasted, strict=True):  # one by one: a grid is larger than its picture
        x1, y1, x2, y2 = box
        rows, columns = torch.meshgrid((y - y1) / (y2 - y1) * 2 - 1, (x - x1) / (x2 - x1) * 2 - 1, indexing="ij")
        grid = torch.stack([columns, rows], dim=-1)  # in the boxes' dtype: half precision is too coarse for pixels
        image.copy_(F.grid_sample(mask[None].to(grid.dtype), grid[None], align_corners=False)[0])
    return pasted


def adopt(detector: GeneralizedRCNN) -> None:
    """Let a Faster or Mask R-CNN of torchvision compute, learn and begin as mmdetection's does."""
    old = detector.transform
    detector.transform = Transform(old.min_size, old.max_size, old.image_mean, old.image_std, old.size_divisible)
    anchors = detector.rpn.anchor_generator
    detector.rpn.anchor_generator = Anchors(anchors.sizes, anchors.aspect_ratios)
    set_coder(detector, Coder)
    learn_as_mmdetection(detector)
    detector.roi_heads.box_roi_pool = Pool(7)
    if detector.roi_heads.has_mask():
        detector.roi_heads.mask_roi_pool = Pool(14)
