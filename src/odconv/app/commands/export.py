"""The commands `odconv export` and `odconv detect export`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from odconv.app.classify import restore as classify
from odconv.app.detect import restore as detect
from odconv.export.network import Precision
from odconv.export.onnx_file import Form, export_onnx
from odconv.export.torch_file import export_torch
from odconv.export.written import Written
from odconv.layers.pooling import has_attentions
from odconv.system.devices import Device, find_device

Format = Literal["onnx", "torch", "aoti"]


@dataclass(frozen=True, kw_only=True)
class File:
    """What is to be written."""

    out: str
    """File to write, ending in .onnx, or in .pt2 for torch and aoti; one that is there is replaced."""
    format: Format = "onnx"
    """onnx, torch for a program of torch.export, or aoti for one compiled for this machine."""
    form: Form = "loop"
    """Of ONNX: loop computes one image after the other, product a batch at once."""
    opset: int = 18
    """Of ONNX: version of its operators, at least 18."""
    precision: Precision = "float32"
    """Of weights and activations: float32, float16 or, not in ONNX, bfloat16; of ONNX: int8 for weights."""
    device: Device = "cpu"
    """For what torch and aoti are made: cpu, gpu, or auto for a GPU if there is one; ONNX runs anywhere."""
    batch_one: bool = False
    """Take one image at a time only."""
    dynamic_size: bool = False
    """Take images of other sizes too."""
    verify: bool = True
    """Compare the file with the network before it takes its place."""

    def __post_init__(self) -> None:
        suffix = ".onnx" if self.format == "onnx" else ".pt2"
        if Path(self.out).suffix != suffix:  # the name tells odconv predict how to open it
            other = "format torch or aoti writes .pt2" if suffix == ".onnx" else "format onnx writes .onnx"
            raise ValueError(f"out must end in {suffix} where format is {self.format}, got {self.out}; {other}")
        if self.format != "onnx" and self.precision == "int8":
            raise ValueError(f"precision must be float32, float16 or bfloat16 where format is {self.format}, got int8")


@dataclass(frozen=True, kw_only=True)
class BackboneFile(File):
    """What is to be written of a detector's backbone."""

    height: int = 800
    """Of the images, in pixels."""
    width: int = 1344
    """Of the images, in pixels."""
    dynamic_size: bool = True
    """Take images of other sizes too."""
    sizes: bool | None = None
    """Take a second input, the height and width of each image without its padding, for the attentions to pool over the
    images alone; default: as the detector's masked_pool."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Export(classify.Description, File):
    """The options of `odconv export`."""


@dataclass(frozen=True, kw_only=True)
class BackboneExport(detect.Description, BackboneFile):
    """The options of `odconv detect export`."""


def export(*, weights: str, **options: Any) -> Written:
    """Write a trained network as a file for other programs.

    Args:
        weights: A checkpoint of odconv train, or a folder of odconv release or its name, which say what network it is;
            or another file of weights.
        **options: the fields of :class:`Export`.

    Raises:
        ValueError: an option or weights that do not fit, a layer that cannot be exported, or a file that does not
            compute what the network does.
    """
    from odconv.app.data.transforms import MEAN, STD

    config = Export(**options)
    place = find_device(config.device)
    restored = classify.restore(weights, **{name: getattr(config, name) for name in classify.NAMES})
    notes = {
        "arch": restored.arch,
        "classes": restored.names or restored.classes,
        "image_size": restored.image_size,
        "resize_size": restored.resize_size,
        "mean": MEAN,
        "std": STD,
    }
    size = (3, restored.image_size, restored.image_size)
    notes = {name: note for name, note in notes.items() if note is not None}
    shape = f"({1 if config.batch_one else 'batch'}, {restored.num_classes})"
    return _export(restored.model.to(place), restored.arch, size, shape, notes, config)


def export_backbone(*, weights: str, **options: Any) -> Written:
    """Write the backbone of a trained detector, with its feature pyramid, as a file for other programs.

    Args:
        weights: A checkpoint of odconv detect train, which says what detector it is, or another file of a detector.
        **options: the fields of :class:`BackboneExport`.
    """
    from odconv.app.data.transforms import MEAN, STD

    config = BackboneExport(**options)
    place = find_device(config.device)
    restored = detect.restore(weights, **{name: getattr(config, name) for name in detect.NAMES})
    backbone: Any = restored.model.backbone.to(place)
    notes = {"detector": restored.name, "classes": restored.classes, "mean": MEAN, "std": STD}
    masked = bool(restored.model.masked_pool) and has_attentions(backbone)
    sizes = masked if config.sizes is None else config.sizes
    size = (3, config.height, config.width)
    return _export(backbone, f"backbone of {restored.name}", size, "", notes, config, sizes)


def _export(
    model: nn.Module,
    title: str,
    size: tuple[int, int, int],
    shape: str,
    notes: dict[str, Any],
    file: File,
    sizes: bool = False,
) -> Written:
    """Write a network, and say what was written."""
    print(f"exporting {title}, which may take minutes ...", file=sys.stderr, flush=True)
    options: dict[str, Any] = {"dynamic_size": file.dynamic_size, "sizes": sizes, "precision": file.precision}
    options |= {"check": file.verify, "metadata": notes}
    if file.format == "onnx":
        written = export_onnx(model, file.out, size, not file.batch_one, form=file.form, opset=file.opset, **options)
    else:
        written = export_torch(model, file.out, size, not file.batch_one, compiled=file.format == "aoti", **options)
    kind = {"onnx": f"ONNX with opset {file.opset}", "torch": "torch.export", "aoti": "AOTInductor"}[file.format]
    batch, side = "1" if file.batch_one else "batch", "height, width" if file.dynamic_size else f"{size[1]}, {size[2]}"
    print(f"{written.path}: {title}, {kind}, {file.precision}, {written.megabytes:.1f} MB")
    inputs = f"images ({batch}, 3, {side})" + (f", sizes ({batch}, 2)" if sizes else "")
    print(f"{inputs} -> {', '.join(written.outputs)} {shape}".rstrip())
    if written.error is not None:
        print(f"differs from PyTorch by {written.error:.1e} of the greatest output at most")
    return written
