"""MobileNetV2 0.5 on Imagenette at 96 pixels: static, ODConv 1x and 4x, by the same recipe and seed.

    python benchmarks/imagenette.py --data ../shared/data/imagenette96

Safe to stop and to call again: finished runs are kept, an unfinished one goes on from its last epoch.
"""

import argparse
import csv
import json
from pathlib import Path

from common import RESULTS, origin, write_rows

from odconv.cli import main as command

RECIPES = ("imagenette_mobilenetv2_050", "imagenette_od_mobilenetv2_050_1x", "imagenette_od_mobilenetv2_050_4x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Imagenette")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the runs (default: runs)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results, curves = [], []
    for recipe in RECIPES:
        run = args.runs / f"{recipe}_seed{args.seed}"
        train = ["train", "--config", recipe, "--data", args.data, "--out", str(run), "--seed", str(args.seed)]
        train += ["--devices", "1"]
        if not (run / "origin.json").exists():
            if command([*train, "--resume", "auto"]):
                raise SystemExit(1)
            (run / "origin.json").write_text(json.dumps(origin()))
        result, where = (json.loads((run / name).read_text()) for name in ("result.json", "origin.json"))
        shown = f"odconv train --config {recipe} --data {args.data} --out runs/{run.name} --seed {args.seed}"
        results.append({"recipe": recipe, "seed": args.seed, **result, **where, "command": shown})
        with (run / "metrics.csv").open(newline="") as file:
            curves += [{"recipe": recipe, "seed": args.seed, **row} for row in csv.DictReader(file)]
    write_rows(RESULTS / "imagenette.csv", results)
    write_rows(RESULTS / "imagenette_epochs.csv", curves)


if __name__ == "__main__":
    main()
