"""How well a new network learns in sixty steps, by method and start: a deep small network on scikit-learn's digits.

    python -m benchmarks.starts
    python -m benchmarks.starts --methods odconv_4x --lr 0.02 0.2 --optimizer adamw

Eight inverted residuals, 24 convolutions besides the stem, learn 1,200 digits of 8 x 8 pixels by plain SGD with
momentum and a cosine, at temperature 1, and are tested on the other 597. The starts: settled, the default of
odconv.convert(warm_start=False); calm, the default of the layers, with the published formula; published.

Each network is tested as it is, and again with batch norm's statistics recomputed on the 1,200: the running averages
lag behind the weights after few steps, the more the faster these move.
"""

import argparse
from statistics import mean

import torch
from benchmarks.common import RESULTS, Sheet, origin
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torchvision.models.mobilenetv2 import InvertedResidual

import odconv
from odconv.conversion.convert import WAREHOUSE_OPTIONS, find_family, options_of
from odconv.conversion.warehouse import METHOD
from odconv.layers.starts import SETTLED

METHODS = {  # options of odconv.convert; None stays static
    "static": None,
    "condconv_8x": {"to": "condconv"},
    "dyconv_4x": {"to": "dyconv"},
    "odconv_1x": {"to": "odconv", "kernel_num": 1},
    "odconv_4x": {"to": "odconv"},
    "kernelwarehouse_1x": {"to": "kernelwarehouse", "budget": 1},
    "kernelwarehouse_4x": {"to": "kernelwarehouse", "budget": 4},
}
VARIANTS = {  # further options
    "settled": {},
    "calm": {"gain": 1.0, "kernel_gain": 1.0},
    "published": {"init": "published"},
}
TRAINED = 1200
WIDTH, BLOCKS, CLASSES, BATCH = 16, 8, 10, 64


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) between -1 and 1, and labels, in a random order that is always the same."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images[order], torch.tensor(data.target)[order]


def network(method: str, variant: str, seed: int) -> nn.Module:
    """Draw the network and make its convolutions dynamic, all but the stem."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU6(),
        *(InvertedResidual(WIDTH, WIDTH, 1, 4) for _ in range(BLOCKS)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(WIDTH, CLASSES),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # as torchvision draws MobileNetV2
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    options = METHODS[method]
    if options is None:
        return model
    known = WAREHOUSE_OPTIONS if options["to"] == METHOD else options_of(find_family(options["to"])[0])
    norm = {} if variant != "calm" else {"norm": "none" if options["to"] in ("condconv", "dyconv") else "batch"}
    chosen = {name: value for name, value in (VARIANTS[variant] | norm).items() if name in known}
    return odconv.convert(model, warm_start=False, **options | chosen)


def train(model: nn.Module, images: Tensor, labels: Tensor, lr: float, steps: int, seed: int, optimizer: str) -> float:
    """Train in place; return the last loss."""
    random = torch.Generator().manual_seed(seed)
    if optimizer == "sgd":
        chosen: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    else:
        chosen = torch.optim.AdamW(odconv.parameter_groups(model, lr=lr, weight_decay=0.05))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, steps)
    epochs = -(-steps * BATCH // len(labels))
    order = torch.cat([torch.randperm(len(labels), generator=random) for _ in range(epochs)])
    model.train()
    for batch in order[: steps * BATCH].split(BATCH):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        schedule.step()
    return loss.item()


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in evaluation mode, in %."""
    return 100 * (model.eval()(images).argmax(1) == labels).double().mean().item()


def accuracies(
    method: str, variant: str, lr: float, seeds: int, steps: int = 60, optimizer: str = "sgd"
) -> tuple[list[float], list[float]]:
    """Top-1 on the digits not trained on, a number for each seed: as trained, and with recomputed statistics."""
    images, labels = digits()
    found, recomputed = [], []
    for seed in range(seeds):
        model = network(method, variant, seed)
        train(model, images[:TRAINED], labels[:TRAINED], lr, steps, seed, optimizer)
        found.append(top1(model, images[TRAINED:], labels[TRAINED:]))
        update_bn(images[:TRAINED].split(BATCH), model)
        recomputed.append(top1(model, images[TRAINED:], labels[TRAINED:]))
    return found, recomputed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--lr", nargs="+", type=float, default=[0.1])
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="sgd")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    print(f"{'method':18} {'start':12} {'lr':>6} {'top-1, %':>9} {'recomputed':>11}  by seed", flush=True)
    sheet = Sheet(RESULTS / "starts.csv", ("method", "start", "optimizer", "lr", "steps"))
    for method in args.methods:
        for variant in args.variants if method != "static" else ["calm"]:
            if variant == "settled" and str((METHODS[method] or {}).get("to")) not in SETTLED:
                continue  # its settled start is the calm one
            for lr in args.lr:
                found, recomputed = accuracies(method, variant, lr, args.seeds, args.steps, args.optimizer)
                by_seed = " ".join(f"{value:.1f}" for value in found)
                start = "" if method == "static" else variant
                print(
                    f"{method:18} {start:12} {lr:6g} {mean(found):9.1f} {mean(recomputed):11.1f}  {by_seed}", flush=True
                )
                row = {"method": method, "start": start, "optimizer": args.optimizer, "lr": lr, "steps": args.steps}
                top = {"top1": f"{mean(found):.2f}", "by_seed": by_seed, "recomputed": f"{mean(recomputed):.2f}"}
                sheet.add([row | top | origin()])


if __name__ == "__main__":
    main()
