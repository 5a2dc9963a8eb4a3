"""How a warm start learns in a short training at a high rate: MobileNetV2 with ImageNet weights, on digits.

    python -m benchmarks.warm --weights ../shared/data/weights/mobilenet_v2_1.0_imagenet_fp16.pth

1,200 of scikit-learn's digits at 32 x 32 pixels, batches of 64, plain SGD with momentum and a cosine, or AdamW; tested
on the other 597.
The paces: warm, what odconv.convert chooses; full, temperature 1, shares that sum to 1, CondConv's published start.
"""

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from benchmarks import starts
from benchmarks.common import RESULTS, Sheet, origin
from benchmarks.starts import TRAINED, digits, top1, train
from torch import Tensor, nn
from torch.nn import functional as F

import odconv
from odconv.conversion.warehouse import METHOD

METHODS = {name: options for name, options in starts.METHODS.items() if (options or {}).get("to") != METHOD}
FULL: dict[str, dict[str, Any]] = {
    "condconv": {"init": "published"},
    "dyconv": {"kernel_gain": 1.0},
    "odconv": {"temperature": 1.0, "kernel_gain": 1.0},
}


def images_and_labels() -> tuple[Tensor, Tensor]:
    """Images (1797, 3, 32, 32) between -1 and 1, and labels."""
    images, labels = digits()
    return F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1), labels


def accuracies(
    method: str, pace: str, weights: Path, lr: float, seeds: int, steps: int = 60, optimizer: str = "sgd"
) -> list[float]:
    """Top-1 on the digits that were not trained on, a number for each seed."""
    images, labels = images_and_labels()
    found = []
    for seed in range(seeds):
        model = odconv.create_model("mobilenetv2_100", weights=weights)
        torch.manual_seed(seed)
        model.classifier[1] = nn.Linear(model.classifier[1].in_features, 10)
        if (options := METHODS[method]) is not None:
            odconv.convert(model, **options, **(FULL[options["to"]] if pace == "full" else {}))
        train(model, images[:TRAINED], labels[:TRAINED], lr, steps, seed, optimizer)
        with torch.inference_mode():
            found.append(top1(model, images[TRAINED:], labels[TRAINED:]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of MobileNetV2 1.0")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--paces", nargs="+", choices=["warm", "full"], default=["warm", "full"])
    parser.add_argument("--lr", nargs="+", type=float, default=[0.01])
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "warm.csv")
    args = parser.parse_args()
    print(f"{'method':12} {'pace':6} {'lr':>6} {'top-1, %':>9}  by seed", flush=True)
    sheet = Sheet(args.out, ("method", "pace", "optimizer", "lr", "steps"))
    for lr in args.lr:
        for method in args.methods:
            for pace in args.paces if method != "static" else [""]:
                found = accuracies(method, pace, args.weights, lr, args.seeds, args.steps, args.optimizer)
                by_seed = " ".join(f"{value:.1f}" for value in found)
                print(f"{method:12} {pace:6} {lr:6g} {mean(found):9.1f}  {by_seed}", flush=True)
                row = {"method": method, "pace": pace, "optimizer": args.optimizer, "lr": lr, "steps": args.steps}
                sheet.add([row | {"top1": f"{mean(found):.2f}", "by_seed": by_seed} | origin()])


if __name__ == "__main__":
    main()
