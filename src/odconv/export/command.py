"""The command `odconv export`."""

from typing import Any, Literal

from odconv.export.network import Precision
from odconv.export.onnx_file import Form, export_onnx
from odconv.export.torch_file import export_torch
from odconv.export.written import Written


def export(
    *,
    weights: str,
    out: str,
    format: Literal["onnx", "torch", "aoti"] = "onnx",
    form: Form = "loop",
    opset: int = 18,
    precision: Precision = "float32",
    batch_one: bool = False,
    dynamic_size: bool = False,
    verify: bool = True,
    **network: Any,
) -> Written:
    """Write a trained network as a file for other programs.

    Args:
        weights: A checkpoint of odconv train, which says what network it is, or another file of weights.
        out: File to write; one that is there is replaced.
        format: onnx, torch for a program of torch.export, or aoti for one compiled for this machine.
        form: Of ONNX: loop computes one image after the other, product a batch at once.
        opset: Of ONNX: version of its operators, at least 18.
        precision: Of weights and activations: float32, float16 or, not in ONNX, bfloat16.
        batch_one: Take one image at a time only.
        dynamic_size: Take images of other sizes too.
        verify: Compare the file with the network before it takes its place.
        **network: What the checkpoint does not say; see :func:`odconv.train.restore.restore`.

    Returns:
        What was written.

    Raises:
        ValueError: an option or weights that do not fit, a layer that cannot be exported, or a file that does not
            compute what the network does.
        OSError: the weights cannot be read, or `out` cannot be written.
        ImportError: a package is missing.
    """
    from odconv.data.transforms import MEAN, STD
    from odconv.train.restore import restore

    restored = restore(weights, **network)
    options: dict[str, Any] = {"dynamic_size": dynamic_size, "precision": precision, "check": verify}
    size = (3, restored.image_size, restored.image_size)
    if format == "onnx":
        notes = {
            "arch": restored.arch,
            "classes": restored.classes,
            "image_size": restored.image_size,
            "resize_size": restored.resize_size,
            "mean": MEAN,
            "std": STD,
        }
        metadata = {name: note for name, note in notes.items() if note is not None}
        written = export_onnx(
            restored.model, out, size, not batch_one, form=form, opset=opset, metadata=metadata, **options
        )
    else:
        written = export_torch(restored.model, out, size, not batch_one, compiled=format == "aoti", **options)
    kind = {"onnx": f"ONNX with opset {opset}", "torch": "torch.export", "aoti": "AOTInductor"}[format]
    batch, side = "1" if batch_one else "batch", "height, width" if dynamic_size else f"{size[1]}, {size[2]}"
    print(f"{written.path}: {restored.arch}, {kind}, {precision}, {written.megabytes:.1f} MB")
    print(f"images ({batch}, 3, {side}) -> {', '.join(written.outputs)} ({batch}, {restored.num_classes})")
    if written.error is not None:
        print(f"differs from PyTorch by {written.error:.1e} of the greatest output at most")
    return written
