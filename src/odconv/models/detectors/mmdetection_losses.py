"""What Faster and Mask R-CNN learn from under mmdetection's conventions: matches, losses, targets of masks, first draw.

Written from its documented configuration: `MaxIoUAssigner` (min_pos_iou, match_low_quality), `L1Loss` on boxes,
`CrossEntropyLoss`, masks cut by aligned RoI-align and thresholded, `allowed_border` -1.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou, roi_align

DIVISOR = 32
"""Each image is padded to a multiple of so many pixels before images are padded to the largest of a batch."""

Target = dict[str, Any]


class FlooredMatcher(Matcher):
    """Matches boxes as torchvision's does, but gives each object its best ones only from an overlap on.

    Args:
        positive: overlap (IoU) from which a box matches the object that it overlaps most.
        negative: overlap below which it is background.
        least: overlap from which the boxes that overlap an object most of all match that object, whatever they overlap
            more; None for no such matches.
    """

    def __init__(self, positive: float, negative: float, least: float | None) -> None:
        super().__init__(positive, negative, allow_low_quality_matches=least is not None)
        self.least = least

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        """Return for each of N boxes, given overlaps (M, N) with M objects, the number of its object, or -1, or -2."""
        overlap, objects = match_quality_matrix.max(dim=0)
        matches = torch.full_like(objects, self.BETWEEN_THRESHOLDS)
        matches[overlap < self.low_threshold] = self.BELOW_LOW_THRESHOLD
        matches = torch.where(overlap >= self.high_threshold, objects, matches)
        if self.least is None:
            return matches
        for number, overlaps in enumerate(match_quality_matrix):  # a later object goes before
            best = overlaps.max()
            if best >= self.least:
                matches[overlaps == best] = number
        return matches


class Proposals(RegionProposalNetwork):
    """A region proposal network that leaves out anchors in the padding, and has an L1 loss."""

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Propose boxes; see torchvision's."""
        if targets is not None:
            targets = [target | {"size": size} for target, size in zip(targets, images.image_sizes, strict=True)]
        return super().forward(images, features, targets)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return labels (N) of 1 for objects, 0 for background and -1 for neither, and the box for each anchor."""
        labels, matched = [], []
        for places, target in zip(anchors, targets, strict=True):
            boxes = target["boxes"]
            height, width = (-(-side // DIVISOR) * DIVISOR for side in target["size"])
            x, y = (places[:, :2] + places[:, 2:]).div(2).unbind(1)
            inside = (x < width) & (y < height)
            if len(boxes):
                matches = self.proposal_matcher(torch.where(inside, box_iou(boxes, places), -1.0))
                label = (matches >= 0).to(places.dtype)
                label[matches == self.proposal_matcher.BETWEEN_THRESHOLDS] = -1
                matched.append(boxes[matches.clamp(min=0)])
            else:
                label = places.new_zeros(len(places))
                matched.append(torch.zeros_like(places))
            labels.append(torch.where(inside, label, -1.0))
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and of boxes, over a balanced sample of the anchors."""
        chosen = [torch.cat(masks).nonzero()[:, 0] for masks in self.fg_bg_sampler(labels)]
        positive, both = chosen[0], torch.cat(chosen)
        target = torch.cat(labels)[both]
        boxes = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        return F.binary_cross_entropy_with_logits(objectness.flatten()[both], target), boxes / max(1, len(both))


class Heads(RoIHeads):
    """Heads with an L1 loss, and with masks to learn that are cut from the objects' exactly."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Return detections, or in training the losses; see torchvision's."""
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, matches, labels, deltas = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, boxes = self.box_predictor(pooled)
        losses = box_losses(logits, boxes, torch.cat(labels), torch.cat(deltas))
        if self.has_mask():
            assert targets is not None  # select_training_samples has seen to it
            objects = [label > 0 for label in labels]
            rois = [places[positive] for places, positive in zip(proposals, objects, strict=True)]
            predicted = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, rois, image_shapes)))
            wanted = [
                cut_masks(target["masks"], match[positive], places, predicted.shape[-1])
                for target, match, positive, places in zip(targets, matches, objects, rois, strict=True)
            ]
            classes = torch.cat([label[positive] for label, positive in zip(labels, objects, strict=True)])
            losses["loss_mask"] = mask_loss(predicted, classes, torch.cat(wanted))
        return [], losses


def box_losses(logits: Tensor, boxes: Tensor, labels: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    """Return the losses of classes and boxes.

    Args:
        logits: of the classes, (N, K).
        boxes: deltas that are predicted for each class, (N, 4 K).
        labels: the class of each box, (N); 0 for background.
        deltas: what those of the class should be, (N, 4).
    """
    positive = torch.where(labels > 0)[0]
    of_class = boxes.unflatten(1, (-1, 4))[positive, labels[positive]]
    distance = F.l1_loss(of_class, deltas[positive], reduction="sum") / max(1, len(labels))
    return {"loss_classifier": F.cross_entropy(logits, labels), "loss_box_reg": distance}


def cut_masks(masks: Tensor, matches: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut the masks (M, H, W) of the objects that boxes (N, 4) match out of these boxes: 0 or 1, (N, size, size)."""
    rois = torch.cat([matches[:, None].to(boxes), boxes], dim=1)
    return (roi_align(masks[:, None].to(boxes), rois, size, aligned=True)[:, 0] >= 0.5).to(boxes)


def mask_loss(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Return the loss of masks, (N, K, m, m) of logits, of which those of the class count; 0 where there is none."""
    if not len(labels):
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(labels)), labels], wanted)


def learn_as_mmdetection(detector: GeneralizedRCNN) -> None:
    """Let a Faster or Mask R-CNN of torchvision learn as mmdetection's does, and begin as that does."""
    rpn, heads = detector.rpn, detector.roi_heads
    rpn.__class__, heads.__class__ = Proposals, Heads  # all that they hold stays
    rpn.proposal_matcher = FlooredMatcher(rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold, 0.3)
    high, low = heads.proposal_matcher.high_threshold, heads.proposal_matcher.low_threshold
    heads.proposal_matcher = FlooredMatcher(high, low, high if heads.has_mask() else None)
    fpn = detector.backbone.fpn
    for layer in chain(fpn.inner_blocks.modules(), fpn.layer_blocks.modules(), heads.box_head.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    for layer, spread in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=spread)
        nn.init.zeros_(layer.bias)
