"""torchvision's detectors, whose answer to an image does not depend on the images beside it."""

from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from odconv.layers import pool_inside
from odconv.layers.pooling import has_attentions


class Independent:
    """Keeps the attentions of a dynamic backbone from the padding that makes the images of a batch alike.

    In evaluation mode the backbone gets one image at a time; with `masked_pool`, in both modes, all at once, and the
    attentions pool over the images alone.
    """

    masked_pool = False

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Return losses in training mode, else the detections of each image; see torchvision's."""
        compute: Any = super().forward  # type: ignore[misc]
        own: Any = self
        if not has_attentions(own.backbone):
            return compute(images, targets)
        if own.masked_pool:
            with ExitStack() as stack:

                def mask(_: Any, __: Any, padded: tuple[ImageList, Any]) -> None:
                    stack.enter_context(pool_inside(own.backbone, extent(padded[0])))

                stack.enter_context(own.transform.register_forward_hook(mask))
                return compute(images, targets)
        if own.training:
            return compute(images, targets)
        return [found for image in images for found in compute([image])]


def extent(images: ImageList) -> Tensor:
    """Return which share of the height and the width of a padded batch each image takes, (B, 2)."""
    height, width = images.tensors.shape[-2:]
    return images.tensors.new_tensor([[h / height, w / width] for h, w in images.image_sizes])


class FasterRCNN(Independent, detection.FasterRCNN):
    """torchvision's Faster R-CNN."""


class MaskRCNN(Independent, detection.MaskRCNN):
    """torchvision's Mask R-CNN."""


class RetinaNet(Independent, detection.RetinaNet):
    """torchvision's RetinaNet."""
