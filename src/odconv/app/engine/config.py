"""The options of every training run: one typed, documented field for each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from math import inf
from typing import Any, Literal, TypeAlias, get_args, get_origin

from odconv.system.text import suggest

Amp: TypeAlias = Literal["none", "bf16", "fp16"]

LOGGERS = ("tensorboard", "csv", "wandb", "mlflow")
"""Lightning's loggers that a run may have besides its own files."""

LARGEST_SIDE = 8192
"""Pixels of the side of an image that a network is given, whether a user or a file says it."""

# what a value must be, and the fields this holds for
RULES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "at least 1",
        lambda value: 1 <= value < inf,
        "kernel_num num_classes epochs batch_size test_batch step temp_init devices top accumulate nan_steps "
        "fast_dev_run save_every detections_per_image",
    ),
    (
        f"at least 1 and at most {LARGEST_SIDE:,}",
        lambda value: 1 <= value <= LARGEST_SIDE,
        "image_size resize_size max_size",
    ),
    (
        "at least 0",
        lambda value: 0 <= value < inf,
        "workers wd temp_epoch blend_epochs warmup_steps warmup_epochs mixup cutmix lr_min",
    ),
    ("at least 0 and at most 2**32 - 1", lambda value: 0 <= value < 2**32, "seed"),
    ("above 0", lambda value: 0 < value < inf, "lr temperature clip timeout attention_lr"),
    ("above 0 and below 1", lambda value: 0 < value < 1, "average"),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, "reduction min_scale gamma warmup_factor"),
    ("at least 0 and at most 1", lambda value: 0 <= value <= 1, "score_threshold nms_threshold threshold erasing"),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, "dropout drop_path momentum label_smoothing"),
)


def check(options: Mapping[str, Any]) -> None:
    """Refuse numbers that are out of range, by a ValueError; None, "auto" and other options are left alone."""
    for allowed, holds, names in RULES:
        for name in names.split():
            value = options.get(name)
            if value not in (None, "auto") and not holds(value):
                raise ValueError(f"{name} must be {allowed}, got {value}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options of every training run, whatever is trained."""

    out: str
    """Folder for checkpoints, logs, the resolved options and the result."""
    arch: str
    """Network, of a detector its backbone, such as od_resnet18; odconv.list_models() has all names."""
    kernel_num: int | None = None
    """Kernels a dynamic layer mixes; default: that of the network."""
    reduction: float | None = None
    """Width of the attention's hidden layer, as a share of the channels; default: that of the network."""
    init: Literal["calm", "published"] = "calm"
    """How new dynamic layers are drawn: calm, to train from the first step at temperature 1, or published."""
    layer_options: dict[str, Any] | None = None
    """Further options of the dynamic layers, such as {norm: layer, gain: 2.0}."""
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images in a step of the optimizer, over all processes."""
    accumulate: int = 1
    """Parts in which a process works through its share of a step, one after the other, to save memory."""
    test_batch: int
    """Images in an evaluation step, over all processes."""
    workers: int | None = None
    """Processes that read images, for each training process; default: by the number of CPU cores, at most 8."""
    lr: float
    """Learning rate at the start."""
    schedule: Sequence[int]
    """Epochs at which the learning rate drops."""
    gamma: float = 0.1
    """Factor of each drop."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: sgd, with weight decay on every parameter, or adamw, with none on biases and norms."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's form of it."""
    wd: float = 1e-4
    """Weight decay; some 0.05 suits adamw."""
    attention_lr: float = 1.0
    """Learning rate of the attentions, as a factor of lr."""
    clip: float | None = None
    """Largest norm of the gradient; longer ones are scaled down to it. Default: no limit."""
    average: float | None = None
    """Evaluate and keep a running average of the weights; this is the part of it that a step keeps, such as 0.9999."""

    amp: Amp = "none"
    """Mixed precision: none, bf16 or fp16."""
    compress: Literal["none", "bf16", "fp16"] = "none"
    """Number format in which processes exchange gradients; none: that of the weights."""
    devices: int | Literal["auto"] = "auto"
    """GPUs, or CPU processes, to train on; auto: all GPUs, else one process; torchrun decides by itself."""
    timeout: float = 1800.0
    """How long processes wait for each other before they give up, in seconds."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""
    save_every: int | None = None
    """Steps after which last.ckpt is written, besides the end of each epoch."""
    nan_steps: int = 20
    """Stop after so many steps in a row without a finite loss or a readable image; on GPUs up to twice as many."""
    logger: str = "tensorboard"
    """Where the curves go besides metrics.csv: tensorboard, csv, wandb, mlflow, or several with commas; or none."""
    fast_dev_run: int | None = None
    """Try so many batches of training and of evaluation, see that all goes well, and leave nothing behind."""
    profile: bool = False
    """Write a trace of a few steps to the folder trace/, for chrome://tracing or Perfetto."""
    resume: str | None = None
    """Checkpoint to go on from; auto: the last one in out, if there is one."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        check(vars(self))
        logger_names(self.logger)
        if list(self.schedule) != sorted({epoch for epoch in self.schedule if isinstance(epoch, int) and epoch >= 1}):
            raise ValueError(f"schedule must be ascending whole numbers of at least 1, got {[*self.schedule]}")
        for field in fields(self):
            choices, value = get_args(field.type), getattr(self, field.name)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")


def defaults(config: type[RunConfig]) -> dict[str, Any]:
    """Return the options of a kind of run that have a default, and the default."""
    return {field.name: field.default for field in fields(config) if field.default is not MISSING}


def logger_names(option: str) -> list[str]:
    """Return the loggers that the option `logger` names; a ValueError where there is no such."""
    names = [] if option == "none" else option.split(",")
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"logger must be none, or one or more of {', '.join(LOGGERS)} with commas between, got "
                f"{option!r}{suggest(name, LOGGERS)}"
            )
    return names
