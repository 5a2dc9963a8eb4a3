"""The options of training a classifier."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from odconv.app.engine.config import RunConfig

Stem: TypeAlias = Literal["standard", "small"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Options of `odconv train`; the defaults are those of the published ResNets."""

    num_classes: int | None = None
    """Outputs of the classifier; default: the number of classes in the data."""
    dropout: float = 0.0
    """Share of features dropped before the classifier."""
    stem: Stem = "standard"
    """First layers: standard, or small for images well below 100 pixels."""
    weights: str | None = None
    """File of weights to start from."""
    warm_start: bool = False
    """weights are those of the static network of the same name, from which the dynamic one starts."""
    new_classifier: bool = False
    """Leave the last layer, which tells the classes, out of weights: for other classes."""

    data: str
    """Folder with train/ and val/ (or archives of them), folder of CIFAR-10, or the word digits."""
    image_size: int = 224
    """Side of the images that the network sees, in pixels."""
    resize_size: int | None = None
    """Shorter side before the centre is cropped in evaluation, in pixels; default: 8/7 of image_size, 256 for 224."""
    augment: Literal["imagenet", "randaugment", "small", "none"] = "imagenet"
    """Augmentation: imagenet (random crop of random size, flip), randaugment (these and RandAugment), small (shift,
    flip) or none."""
    min_scale: float = 0.08
    """Smallest share of an image's area that augment imagenet and randaugment cut out."""

    epochs: int = 100
    batch_size: int = 256
    test_batch: int = 100
    lr: float = 0.1
    lr_decay: Literal["schedule", "step", "cos"] = "schedule"
    """Times gamma at the epochs of schedule, times gamma every step epochs, or half a cosine down to lr_min."""
    lr_min: float = 0.0
    """Learning rate to which lr_decay cos falls."""
    schedule: Sequence[int] = (30, 60, 90)
    step: int = 30
    """Epochs between the drops of lr_decay step."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises in a straight line, with every step."""
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes."""
    mixup: float = 0.0
    """Parameter of the beta distribution that mixes pairs of images (mixup); 0: none are mixed."""
    cutmix: float = 0.0
    """The same for parts of images cut into others (cutmix); with both, each batch draws one of them."""
    erasing: float = 0.0
    """Share of the images of which a random part is replaced by noise (random erasing)."""
    drop_path: float = 0.0
    """Share of the residual branches of a ResNet or ConvNeXt that are left out, image by image (stochastic depth)."""
    temp_epoch: int = 0
    """Epochs in which the temperature of dynamic layers falls to 1, or KernelWarehouse's blend from 1 to 0, with every
    step; 0: the temperature stays as it is, 1 or that of weights, after a warm start 5, and the blend is 0."""
    temp_init: float = 30.0
    """Temperature at the start."""

    channels_last: bool = False
    """Keep the channels of an image together in memory, which suits the matrix units of GPUs."""
    compile: bool = False
    """Compile the network with torch.compile."""
    sync_batch_norm: bool = False
    """Batch norm over the images of all processes; on GPUs alone."""
