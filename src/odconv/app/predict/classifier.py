"""A trained classifier, whatever file it came from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from odconv.app.data import evaluation_transform, imagenet_names, normalise
from odconv.app.data.transforms import MEAN, STD

ELONGATED = 50
"""How many times as long as wide an image may be; of longer ones the middle is taken before they are resized, which
would make gigabytes of them."""


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A trained network that says what is on images: ``classifier(torch.stack([classifier.prepare(image)]))``.

    Attributes:
        name: of the network, such as od_resnet18, or else of its file.
        compute: from normalised images (B, 3, H, W) in float32, on `device`, to logits (B, classes).
        classes: names of the outputs.
        image_size: side of the images that it is given, in pixels.
        resize_size: shorter side before the centre is cropped, in pixels.
        device: where it is given images.
        mean: what is subtracted from each channel, where white is 1.
        std: what each channel is divided by then.
        batch: how many images `compute` takes at a time; None for any number.
        model: the network; None where a file computes by itself.
    """

    name: str
    compute: Callable[[Tensor], Tensor]
    classes: list[str]
    image_size: int
    resize_size: int
    device: torch.device
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    batch: int | None = None
    model: nn.Module | None = None

    def __post_init__(self) -> None:
        evaluation_transform(self.image_size, self.resize_size)  # refuses sizes that do not fit

    def prepare(self, image: Image.Image) -> Tensor:
        """Resize an RGB image and crop its centre: bytes (3, image_size, image_size)."""
        longest = ELONGATED * min(image.size)
        if max(image.size) > longest:
            left, top = (max(0, extent - longest) // 2 for extent in image.size)
            image = image.crop((left, top, image.width - left, image.height - top))
        return evaluation_transform(self.image_size, self.resize_size)(image)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes), in float32 on the CPU, of bytes (B, 3, image_size, image_size)."""
        return torch.cat([self._logits(part) for part in images.split(self.batch or len(images))])

    def _logits(self, images: Tensor) -> Tensor:
        missing = (self.batch or len(images)) - len(images)
        full = torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing else images
        return self.compute(normalise(full.to(self.device), self.mean, self.std))[: len(images)].float().cpu()


def class_names(file: str | None, known: Sequence[str] | None, outputs: int) -> list[str]:
    """Name the outputs of a network: by a text file with a name a line, or by names that the weights come with.

    ImageNet's folders, which are called by WordNet ids, get their readable names, and so do 1,000 outputs without any
    names. Those without a name are numbered. It is a ValueError if the file has another number of lines, or is no text.
    """
    if file is not None:
        try:
            known = Path(file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"classes must be a text file in UTF-8, got {file}") from error
        if len(known) != outputs:
            raise ValueError(f"classes must be a file of {outputs} lines, one an output, but {file} has {len(known)}")
    elif outputs == 1000 and (not known or known[0] == "n01440764"):
        known = imagenet_names()
    known = list(known or [])[:outputs]
    return known + [f"class {i}" for i in range(len(known), outputs)]
