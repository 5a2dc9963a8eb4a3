"""Take the runs of `odconv detect train` into the rows of docs/detect.md.

    OMP_NUM_THREADS=1 python -m benchmarks.detecting runs/static runs/od --data ../shared/data/coco-mini

    python -m benchmarks.detecting --choose large.json --data ../shared/data/coco-mini     # for trainings from nothing

Each detector's last weights are measured on the images it was trained on; `--annotations` says which. A row for each
run goes to results/detect_evaluated.csv, and one for each of its epochs, measured on what the run was told to, to
results/detect_training.csv. Machine, versions and commit are those of this command: call it where the run was trained.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import yaml
from benchmarks.common import RESULTS, Sheet, origin

from odconv.app.detect import evaluate
from odconv.models.build import split_name

SCORES = ("ap", "ap50", "mask_ap", "mask_ap50")
KINDS = ("detector", "backbone", "kernel_num", "conventions", "start")
CLASSES = ("person", "cat", "dog", "train", "pizza", "zebra", "cow", "bed")
LARGE = 24 / 128
"""Side of a square as large as an object, over that of the image, from which the object is large."""
DIGITS = {
    "epoch": 0, "steps": 0, "lr": 6, "temperature": 1, "train_loss": 6, "ap": 4, "ap50": 4, "mask_ap": 4,
    "train_seconds": 6, "val_seconds": 6,
}  # fmt: skip
"""The columns of an epoch, and the digits after the point."""


def describe(options: dict[str, Any]) -> dict[str, str]:
    """Return what was trained, in words of the rows."""
    start = "warm" if options["warm_start"] else "pretrained" if options["weights_backbone"] else "new"
    return {
        "detector": options["detector"],
        "backbone": options["arch"],
        "kernel_num": str(options["kernel_num"] or "") if split_name(options["arch"])[0] else "",
        "conventions": options["conventions"],
        "start": start,
    }


def choose_large(content: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a file of COCO's annotations in which all objects of CLASSES are large, and no crowds."""
    wanted = {one["id"] for one in content["categories"] if one["name"] in CLASSES}
    area = {one["id"]: one["width"] * one["height"] for one in content["images"]}
    large: dict[int, bool] = {}
    for one in content["annotations"]:
        if one["category_id"] in wanted:
            fits = not one["iscrowd"] and one["area"] >= LARGE**2 * area[one["image_id"]]
            large[one["image_id"]] = fits and large.get(one["image_id"], True)
    kept = {image for image, fits in large.items() if fits}
    return content | {
        "images": [one for one in content["images"] if one["id"] in kept],
        "annotations": [one for one in content["annotations"] if one["image_id"] in kept],
    }


def epochs(folder: Path) -> list[dict[str, str]]:
    """Return a row for each epoch of a run."""
    with (folder / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [
        {name: f"{float(one[name]):.{digits}f}" for name, digits in DIGITS.items() if one.get(name)} for one in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs")
    parser.add_argument("--choose", type=Path, help="where to write the annotations of images of large objects alone")
    parser.add_argument("--data", required=True, help="folder of a data set in COCO's format")
    parser.add_argument("--images", default="train2017", help="folder of the images that are measured on")
    parser.add_argument("--annotations", default="annotations/instances_train2017.json", help="annotations of these")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the two CSV files")
    args = parser.parse_args()
    if args.choose:
        args.choose.write_text(json.dumps(choose_large(json.loads((Path(args.data) / args.annotations).read_text()))))
        return
    evaluated = Sheet(args.results / "detect_evaluated.csv", KINDS)
    training = Sheet(args.results / "detect_training.csv", (*KINDS, "epoch"))
    for folder in args.runs:
        kind = describe(yaml.safe_load((folder / "config.yaml").read_text()))
        rows, taken = epochs(folder), origin()
        training.add([kind | row | taken for row in rows])
        scores = evaluate(
            weights=str(folder / "last.ckpt"),
            data=args.data,
            images=args.images,
            annotations=args.annotations,
            workers=0,
        )
        row = {
            "epochs": rows[-1]["epoch"],
            "train_loss": rows[-1]["train_loss"],
            "fastest_epoch_seconds": min((row["train_seconds"] for row in rows), key=float),
            "images": scores["images"],
        }
        row |= {name: f"{scores[name]:.2f}" for name in SCORES if name in scores}
        evaluated.add([kind | row | taken])


if __name__ == "__main__":
    main()
