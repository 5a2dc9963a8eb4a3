"""torchvision's detectors, whose answer to an image does not depend on the images beside it."""

from typing import Any

from torch import Tensor
from torchvision.models import detection

from odconv.layers import DynamicConv


class OneByOne:
    """In evaluation mode, gives a dynamic backbone one image at a time.

    Images of a batch are padded to the largest, and an attention's global pool sees the padding.
    """

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return losses in training mode, else the detections of each image; see torchvision's."""
        compute: Any = super().forward  # type: ignore[misc]
        own: Any = self
        dynamic = any(isinstance(module, DynamicConv) for module in own.backbone.modules())
        if own.training or not dynamic:
            return compute(images, targets)
        return [found for image in images for found in compute([image])]


class FasterRCNN(OneByOne, detection.FasterRCNN):
    """torchvision's Faster R-CNN."""


class MaskRCNN(OneByOne, detection.MaskRCNN):
    """torchvision's Mask R-CNN."""


class RetinaNet(OneByOne, detection.RetinaNet):
    """torchvision's RetinaNet."""
