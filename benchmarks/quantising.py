"""Kernels in eight bits (`odconv.export_onnx(..., precision="int8")`) against float32, in onnxruntime on the CPU.

    python benchmarks/quantising.py                                      latency and size, batch 1
    python benchmarks/quantising.py --models --data ../shared/data/imagenet-sample \
        --weights ../shared/data/weights/mobilenet_v2_1.0_imagenet_fp16.pth       accuracy

Latency: as in export.py, one session a process, in turns; ratios are to the static network and to float32.
Accuracy: of MobileNetV2 1.0 with these weights, and of four kernels around them, on the images of `--data`. The kernels
differ from each other by noise whose mean is zero, and the attentions from image to image, so that mixing matters; that
costs the network accuracy. `agreement` says how often the class is that of the same network in float32, `loss` by how
many points the accuracy falls. Rows go to results/quantising.csv; files that are there are not exported again.
"""

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import MODELS, RESULTS, Sheet, origin, percentiles
from export import measure, settle
from torch import Tensor, nn

import odconv
from odconv.app.data import Images, normalise, open_data
from odconv.models.build import split_name

KEYS = ("measured", "model", "kernel_num", "precision", "threads")
SIZE = 224
CALIBRATING = 20
"""Images whose statistics the batch norm of the attentions takes."""


@torch.no_grad()
def around(model: nn.Module, images: Tensor, kernel_num: int) -> nn.Module:
    """Convert a trained network to kernels that differ, and attentions that differ between images, a little."""
    torch.manual_seed(0)  # the same network in every run, since files that are there stay
    odconv.convert(model, kernel_num=kernel_num)
    layers = [layer for layer in model.modules() if isinstance(layer, odconv.DynamicConv)]
    model.eval()
    for layer in layers:
        layer.attention.bn.train().momentum = None  # takes the statistics of what comes
    model(images)
    random = torch.Generator().manual_seed(0)
    for layer in layers:
        spread = layer.weight.flatten(2).std(2)  # of each filter
        noise = 0.1 * torch.randn(layer.weight.shape, generator=random) * spread.view(*spread.shape, 1, 1, 1)
        layer.weight += noise - noise.mean(0)
        for name, weight in layer.attention.named_parameters():
            if "_fc.weight" in name:
                weight.normal_(0, 0.02 if "kernel" in name else 0.0005, generator=random)
    return model.eval()


def logits(path: Path, images: Images, threads: int) -> Tensor:
    """What an exported network says of all images, one at a time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {"images": normalise(image[None]).numpy()})[0] for image, _ in images]
    return torch.cat([torch.from_numpy(output) for output in outputs])


def compare_accuracy(folder: Path, data: str, weights: Path, n: int, threads: int) -> list[dict[str, Any]]:
    images = open_data(data, image_size=SIZE, resize_size=256, need_train=False).val
    labels = torch.tensor([int(label) for label in images.labels])
    paths = {precision: folder / f"around_{n}x_{precision}.onnx" for precision in ("float32", "int8")}
    static = folder / "around_static.onnx"
    if missing := [precision for precision, path in paths.items() if not path.exists()]:
        model = odconv.create_model("mobilenetv2_100", weights=weights).eval()
        if not static.exists():
            odconv.export_onnx(model, static, (3, SIZE, SIZE))
        some = torch.stack([images[i][0] for i in range(0, len(images), len(images) // CALIBRATING)])
        around(model, normalise(some), n)
        for precision in missing:
            print(odconv.export_onnx(model, paths[precision], (3, SIZE, SIZE), precision=precision), flush=True)
    rows: list[dict[str, Any]] = []
    chosen: dict[str, Tensor] = {}
    for model, precision, path in (
        ("mobilenetv2_100", "float32", static),
        *(("od_mobilenetv2_100", precision, path) for precision, path in paths.items()),
    ):
        chosen[precision] = logits(path, images, threads).argmax(1)
        top1 = 100 * (chosen[precision] == labels).double().mean().item()
        row = {"measured": "accuracy", "model": model, "kernel_num": "" if path == static else n}
        row |= {"precision": precision, "megabytes": round(path.stat().st_size / 1e6, 1), "images": len(images)}
        row["top1"] = round(top1, 2)
        if precision == "int8":
            row["loss"] = round(rows[-1]["top1"] - top1, 2)
            row["agreement"] = round(100 * (chosen["int8"] == chosen["float32"]).double().mean().item(), 2)
        rows.append(row)
    return rows


def compare_latency(folder: Path, name: str, n: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    paths = {form: folder / f"{name}_{n}x_{form}_{SIZE}.onnx" for form in ("static", "float32", "int8")}
    for form, path in paths.items():
        if not path.exists():
            torch.manual_seed(0)
            static = form == "static"
            model = odconv.create_model(split_name(name)[1] if static else name, kernel_num=None if static else n)
            settle(model)
            print(odconv.export_onnx(model, path, (3, SIZE, SIZE), precision="float32" if static else form), flush=True)
    measured = measure(paths, threads, (1, 3, SIZE, SIZE), seconds) if seconds else {}
    rows = []
    for form, times in measured.items():
        static = form == "static"
        row = {"measured": "latency", "model": split_name(name)[1] if static else name}
        row |= {"kernel_num": "" if static else n, "precision": "float32" if static else form}
        rows.append(row | {"megabytes": round(paths[form].stat().st_size / 1e6, 1)} | percentiles(times))
    for row in rows:
        row["ratio_to_static"] = round(row["median_ms"] / rows[0]["median_ms"], 3)
        row["ratio_to_float32"] = round(row["median_ms"] / rows[1]["median_ms"], 3) if row is not rows[0] else ""
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS, help="networks of the zoo, for latency")
    parser.add_argument("--data", help="images with ImageNet's labels, for accuracy")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of MobileNetV2 1.0, for accuracy")
    parser.add_argument("--kernel_num", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8, help="time for each comparison; 0 only exports")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "odconv-quantising"), help="where the files lie"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "quantising.csv", help="CSV to write")
    args = parser.parse_args()
    if args.data and not args.weights:
        parser.error("--data needs --weights")
    args.folder.mkdir(parents=True, exist_ok=True)
    sheet = Sheet(args.out, KEYS)
    said = origin() | {"threads": args.threads, "onnxruntime": version("onnxruntime")}

    def add(rows: list[dict[str, Any]]) -> None:
        sheet.add([row | said for row in rows])
        for row in rows:
            print({name: value for name, value in row.items() if value != ""}, flush=True)

    for name in args.models:
        add(compare_latency(args.folder, name, args.kernel_num, args.threads, args.seconds))
    if args.data:
        add(compare_accuracy(args.folder, args.data, args.weights, args.kernel_num, args.threads))


if __name__ == "__main__":
    main()
