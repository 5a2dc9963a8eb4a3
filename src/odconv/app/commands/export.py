"""The commands `odconv export` and `odconv detect export`."""

from typing import Any, Literal

from torch import nn

from odconv.export.network import Precision
from odconv.export.onnx_file import Form, export_onnx
from odconv.export.torch_file import export_torch
from odconv.export.written import Written
from odconv.layers.attention import has_attentions
from odconv.system.devices import Device, find_device

Format = Literal["onnx", "torch", "aoti"]


def export(
    *,
    weights: str,
    out: str,
    format: Format = "onnx",
    form: Form = "loop",
    opset: int = 18,
    precision: Precision = "float32",
    device: Device = "cpu",
    batch_one: bool = False,
    dynamic_size: bool = False,
    verify: bool = True,
    **network: Any,
) -> Written:
    """Write a trained network as a file for other programs.

    Args:
        weights: A checkpoint of odconv train, or a folder of odconv release or its name, which say what network it is;
            or another file of weights.
        out: File to write; one that is there is replaced.
        format: onnx, torch for a program of torch.export, or aoti for one compiled for this machine.
        form: Of ONNX: loop computes one image after the other, product a batch at once.
        opset: Of ONNX: version of its operators, at least 18.
        precision: Of weights and activations: float32, float16 or, not in ONNX, bfloat16; of ONNX: int8 for weights.
        device: For what torch and aoti are made: cpu, gpu, or auto for a GPU if there is one; ONNX runs anywhere.
        batch_one: Take one image at a time only.
        dynamic_size: Take images of other sizes too.
        verify: Compare the file with the network before it takes its place.
        **network: What the checkpoint does not say; see :func:`odconv.app.classify.restore.restore`.

    Returns:
        What was written.

    Raises:
        ValueError: an option or weights that do not fit, a layer that cannot be exported, or a file that does not
            compute what the network does.
        OSError: the weights cannot be read, or `out` cannot be written.
        ImportError: a package is missing.
    """
    from odconv.app.classify.restore import restore
    from odconv.app.data.transforms import MEAN, STD

    place = find_device(device)
    restored = restore(weights, **network)
    notes = {
        "arch": restored.arch,
        "classes": restored.names or restored.classes,
        "image_size": restored.image_size,
        "resize_size": restored.resize_size,
        "mean": MEAN,
        "std": STD,
    }
    return _export(
        restored.model.to(place),
        restored.arch,
        (3, restored.image_size, restored.image_size),
        f"(batch, {restored.num_classes})",
        {name: note for name, note in notes.items() if note is not None},
        out=out,
        format=format,
        form=form,
        opset=opset,
        precision=precision,
        batch_one=batch_one,
        dynamic_size=dynamic_size,
        verify=verify,
    )


def export_backbone(
    *,
    weights: str,
    out: str,
    height: int = 800,
    width: int = 1344,
    format: Format = "onnx",
    form: Form = "loop",
    opset: int = 18,
    precision: Precision = "float32",
    device: Device = "cpu",
    batch_one: bool = False,
    dynamic_size: bool = True,
    sizes: bool | None = None,
    verify: bool = True,
    **detector: Any,
) -> Written:
    """Write the backbone of a trained detector, with its feature pyramid, as a file for other programs.

    Args:
        weights: A checkpoint of odconv detect train, which says what detector it is, or another file of a detector.
        out: File to write; one that is there is replaced.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        format: onnx, torch for a program of torch.export, or aoti for one compiled for this machine.
        form: Of ONNX: loop computes one image after the other, product a batch at once.
        opset: Of ONNX: version of its operators, at least 18.
        precision: Of weights and activations: float32, float16 or, not in ONNX, bfloat16; of ONNX: int8 for weights.
        device: For what torch and aoti are made: cpu, gpu, or auto for a GPU if there is one; ONNX runs anywhere.
        batch_one: Take one image at a time only.
        dynamic_size: Take images of other sizes too.
        sizes: Take a second input, the height and width of each image without its padding, for the attentions to pool
            over the images alone; default: as the detector's masked_pool.
        verify: Compare the file with the network before it takes its place.
        **detector: What the checkpoint does not say; see :func:`odconv.app.detect.restore.restore`.

    Returns:
        What was written.

    Raises:
        ValueError, OSError, ImportError: as :func:`export`.
    """
    from odconv.app.data.transforms import MEAN, STD
    from odconv.app.detect.restore import restore

    place = find_device(device)
    restored = restore(weights, **detector)
    backbone: Any = restored.model.backbone.to(place)
    title = f"backbone of {restored.name}"
    notes = {"detector": restored.name, "classes": restored.classes, "mean": MEAN, "std": STD}
    return _export(
        backbone,
        title,
        (3, height, width),
        "",
        notes,
        out=out,
        format=format,
        form=form,
        opset=opset,
        precision=precision,
        batch_one=batch_one,
        dynamic_size=dynamic_size,
        sizes=bool(restored.model.masked_pool) and has_attentions(backbone) if sizes is None else sizes,
        verify=verify,
    )


def _export(
    model: nn.Module,
    title: str,
    size: tuple[int, int, int],
    shape: str,
    notes: dict[str, Any],
    *,
    out: str,
    format: Format,
    form: Form,
    opset: int,
    precision: Precision,
    batch_one: bool,
    dynamic_size: bool,
    sizes: bool = False,
    verify: bool,
) -> Written:
    """Write a network, and say what was written."""
    options: dict[str, Any] = {"dynamic_size": dynamic_size, "sizes": sizes, "precision": precision}
    options |= {"check": verify, "metadata": notes}
    if format == "onnx":
        written = export_onnx(model, out, size, not batch_one, form=form, opset=opset, **options)
    else:
        written = export_torch(model, out, size, not batch_one, compiled=format == "aoti", **options)
    kind = {"onnx": f"ONNX with opset {opset}", "torch": "torch.export", "aoti": "AOTInductor"}[format]
    batch, side = "1" if batch_one else "batch", "height, width" if dynamic_size else f"{size[1]}, {size[2]}"
    print(f"{written.path}: {title}, {kind}, {precision}, {written.megabytes:.1f} MB")
    inputs = f"images ({batch}, 3, {side})" + (f", sizes ({batch}, 2)" if sizes else "")
    print(f"{inputs} -> {', '.join(written.outputs)} {shape}".rstrip())
    if written.error is not None:
        print(f"differs from PyTorch by {written.error:.1e} of the greatest output at most")
    return written
