"""The folders in weights/: small trained networks with their cards, from the runs that made them.

    python -m benchmarks.accuracy --data ../shared/data --datasets imagenette --methods static odconv_1x odconv_4x \\
        --seeds 1
    odconv train --data ../shared/data/imagenette96 --out runs/accuracy/finetuned \\
        --arch odl_mobilenetv2_100 --kernel_num 1 --warm_start true --new_classifier true \\
        --weights ../shared/data/weights/mobilenet_v2_1.0_imagenet_fp16.pth \\
        --init published --temp_init 30 --temp_epoch 2 --image_size 96 --resize_size 96 --min_scale 0.35 \\
        --lr 0.0025 --wd 4e-5 --lr_decay cos --epochs 4 --batch_size 64 --dropout 0
    python -m benchmarks.weights --data ../shared/data

The first two commands, hours long, train what is not there yet; the last one writes the folder of every run that is
there anew, and what its weights reach.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.accuracy.cells import STUDIES
from benchmarks.common import RESULTS, origin, read_rows, write_rows
from torch.utils.data import DataLoader

from odconv import DynamicConv, to_static
from odconv.app.classify.restore import restore
from odconv.app.commands.release import release
from odconv.app.data import normalise, open_data

ROOT = Path(__file__).parents[1]
METHODS = {"imagenette_static": "static", "imagenette_odconv_1x": "odconv_1x", "imagenette_odconv_4x": "odconv_4x"}
"""The folders of networks that were trained from nothing, and their methods of benchmarks.accuracy."""
FINETUNED = "imagenette_odconv_finetuned"
"""The folder of the one that had a warm start."""

CLASSES = (
    "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck", "gas pump",
    "golf ball", "parachute",
)  # fmt: skip
NOTE = (
    "Imagenette 2 (github.com/fastai/imagenette, Apache-2.0): ten classes of ImageNet, 9,469 images to train on and "
    "3,925 to evaluate on, here from copies of 96 x 96 pixels. The images are ImageNet's, copyright of their owners, "
    "for non-commercial research and education."
)
ORIGIN = (
    " The run started from ImageNet weights of MobileNetV2 (Google, Apache-2.0, in repository google-coral/edgetpu), "
    "which have seen most of the images for evaluation, too."
)


def write(name: str, run: Path, out: Path, data: Path) -> dict[str, Any]:
    """Release a run as a folder of this name, in the place of one that is there; return its row."""
    with tempfile.TemporaryDirectory() as folder:
        classes, made = Path(folder, "classes.txt"), Path(folder, name)
        classes.write_text("\n".join(CLASSES), encoding="utf-8")
        note = NOTE + ORIGIN if name == FINETUNED else NOTE
        measured = release(run=str(run), out=str(made), data=str(data), data_note=note, classes=str(classes))
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(made, out / name)
    size = sum(file.stat().st_size for file in (out / name).iterdir())
    scores = {score: f"{measured[score]:.4f}" for score in ("top1", "top5")}
    row = {"name": name, "network": measured["arch"], "megabytes": f"{size / 1e6:.2f}", **scores}
    return row | frozen(out / name, data) | origin()


def frozen(folder: Path, data: Path) -> dict[str, str]:
    """What :func:`odconv.to_static` makes of a dynamic network: its top-1, and how often it chooses the same class."""
    network = restore(str(folder))
    if not any(isinstance(module, DynamicConv) for module in network.model.modules()):
        return {"frozen_top1": "", "frozen_agreement": ""}
    sizes = {"image_size": network.image_size, "resize_size": network.resize_size}
    images = DataLoader(open_data(str(data), need_train=False, **sizes).val, batch_size=100)
    batches = [(normalise(pixels), labels) for pixels, labels in images]
    score = to_static(network.model, batches).after
    return {"frozen_top1": f"{score.accuracy:.4f}", "frozen_agreement": f"{score.agreement:.4f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with imagenette96")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "weights", help="folder for the folders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = {cell.method: cell for cell in STUDIES["main"]("small", 1) if cell.dataset == "imagenette"}
    ends = {name: args.runs / cells[method].name / "done" for name, method in METHODS.items()}  # of a finished run
    ends[FINETUNED] = args.runs / "finetuned/result.json"
    runs = {name: end.parent for name, end in ends.items() if end.exists()}
    if not runs:
        parser.error(
            f"{args.runs} must hold one of these runs, finished: {', '.join(e.parent.name for e in ends.values())}"
        )
    rows = {row["name"]: row for row in read_rows(RESULTS / "weights.csv")}
    rows |= {name: write(name, run, args.out, args.data / "imagenette96") for name, run in runs.items()}
    write_rows(RESULTS / "weights.csv", list(rows.values()))


if __name__ == "__main__":
    main()
