"""The folders in weights/: small trained networks with their cards, from the runs that made them.

    python -m benchmarks.accuracy --data ../shared/data --datasets imagenette --methods static odconv_1x odconv_4x \\
        --seeds 1
    python -m benchmarks.weights --data ../shared/data

The first command, hours long, makes the runs of those that are trained from nothing; what is there is kept. The second
one fine-tunes the one that starts from ImageNet weights, unless that is done, and writes every folder anew, with what
its weights reach.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.accuracy.cells import STUDIES
from benchmarks.common import RESULTS, origin, write_rows

import odconv
from odconv.app.classify import train
from odconv.app.commands.release import release

ROOT = Path(__file__).parents[1]
STUDY = {"imagenette_static": "static", "imagenette_odconv_1x": "odconv_1x", "imagenette_odconv_4x": "odconv_4x"}
"""Folders by the methods of benchmarks.accuracy."""

FINETUNED = "imagenette_warm"
PRETRAINED = "mobilenet_v2_1.0_imagenet_fp16.pth"
CLASSES = {  # of Imagenette, by their numbers among ImageNet's
    0: "tench", 217: "English springer", 482: "cassette player", 491: "chain saw", 497: "church", 566: "French horn",
    569: "garbage truck", 571: "gas pump", 574: "golf ball", 701: "parachute",
}  # fmt: skip
RECIPE = {
    "image_size": 64, "resize_size": 64, "min_scale": 0.35, "batch_size": 64, "test_batch": 250, "epochs": 2,
    "lr": 0.0025, "lr_decay": "cos", "wd": 4e-5, "temp_init": 30.0, "temp_epoch": 1, "workers": 0, "devices": 1,
}  # fmt: skip

DATA = (
    "Imagenette 2 (github.com/fastai/imagenette, Apache-2.0): ten classes of ImageNet, 9,469 images to train on and "
    "3,925 to evaluate on, here from copies of 96 x 96 pixels. The images are ImageNet's, copyright of their owners, "
    "for non-commercial research and education."
)
START = (
    " Training began with MobileNetV2 1.0 for ImageNet (github.com/google-coral/edgetpu, Apache-2.0), an 8-bit file "
    "turned back into floats, of whose classifier the rows of these ten classes were kept. By their names, **3,791 of "
    "the 3,925 images for evaluation are training images of ImageNet**, which that network may have seen: on new "
    "images it knows less than the accuracy says."
)


def finetune(data: Path, out: Path) -> None:
    """Train MobileNetV2 1.0 with ODConv 1x from the weights of the static network."""
    state = odconv.checkpoints.read_state_dict(data / "weights" / PRETRAINED)
    rows = {name: state[name][[*CLASSES]] for name in ("classifier.1.weight", "classifier.1.bias")}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "mobilenetv2_100_imagenette.pth")
        torch.save(state | rows, start)
        train(
            arch="od_mobilenetv2_100", kernel_num=1, weights=str(start), warm_start=True,
            data=str(data / "imagenette96"), out=str(out), **RECIPE,
        )  # fmt: skip


def write(name: str, run: Path, out: Path, data: Path, note: str) -> dict[str, Any]:
    """Release a run as a folder of this name, in the place of one that is there; return its row."""
    with tempfile.TemporaryDirectory() as folder:
        classes, made = Path(folder, "classes.txt"), Path(folder, name)
        classes.write_text("\n".join(CLASSES.values()), encoding="utf-8")
        measured = release(
            run=str(run), out=str(made), data=str(data / "imagenette96"), data_note=note, classes=str(classes)
        )
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(made, out / name)
    size = sum(file.stat().st_size for file in (out / name).iterdir())
    scores = {score: f"{measured[score]:.4f}" for score in ("top1", "top5")}
    return {"name": name, "network": measured["arch"], "megabytes": f"{size / 1e6:.2f}", **scores, **origin()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with imagenette96, and weights of MobileNetV2")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "weights", help="folder for the folders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = {cell.method: cell for cell in STUDIES["main"]("small", 1) if cell.dataset == "imagenette"}
    if missing := [cells[method].name for method in STUDY.values() if not (args.runs / cells[method].name).is_dir()]:
        parser.error(f"these runs must be in {args.runs}, see --help: {', '.join(missing)}")
    if not (args.runs / FINETUNED / "result.json").exists():
        finetune(args.data, args.runs / FINETUNED)
    rows = [write(name, args.runs / cells[STUDY[name]].name, args.out, args.data, DATA) for name in STUDY]
    rows.append(write(FINETUNED, args.runs / FINETUNED, args.out, args.data, DATA + START))
    write_rows(RESULTS / "weights.csv", rows)


if __name__ == "__main__":
    main()
