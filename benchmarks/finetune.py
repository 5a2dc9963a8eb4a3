"""MobileNetV2 with ImageNet weights, fine-tuned on Imagenette: static, and converted with a warm and a cold start.

    python benchmarks/finetune.py --data ../shared/data/imagenette96 \
        --weights ../shared/data/weights/mobilenet_v2_1.0_imagenet_fp16.pth

All runs have the same seed, images in the same order, new classifier and recipe: SGD with momentum 0.9, weight decay
4e-5, a cosine over all steps, batches of 64 images of 96 x 96. The temperature is that of the start, or falls from
another one to 1 in the first part of the run. A cold start draws the dynamic layers afresh and keeps the rest.
"""

import argparse
import shlex
import sys
from math import cos, pi
from pathlib import Path

import torch
from common import RESULTS, Sheet, origin, subset
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import odconv
from odconv.app.data import Images, normalise, open_data
from odconv.app.engine.loaders import evaluation_loader, training_loader
from odconv.layers import Attention, find_temperature, try_temperature

STARTS = {  # options of odconv.convert; None stays static
    "static": None,
    "warm_1x": {"kernel_num": 1},
    "warm_4x": {"kernel_num": 4},
    "cold_1x": {"kernel_num": 1, "warm_start": False},
    "cold_4x": {"kernel_num": 4, "warm_start": False},
}
KEYS = ("network", "start", "init", "seed", "lr", "attention_lr", "temp_init", "temp_share", "epochs", "epoch")


def build(start: str, init: str, weights: Path, classes: int, seed: int) -> nn.Module:
    model = odconv.create_model("mobilenetv2_100", weights=weights)
    torch.manual_seed(seed)
    model.classifier[1] = nn.Linear(model.classifier[1].in_features, classes)
    model = model if STARTS[start] is None else odconv.convert(model, init=init, **STARTS[start])
    return model.to(memory_format=torch.channels_last)


def some(images: Images, count: int | None, seed: int) -> Images:
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return subset(images, chosen.sort().values.tolist())


def top1(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    with torch.inference_mode():
        hits = [model(normalise(images)).argmax(1) == labels for images, labels in loader]
    return 100 * torch.cat(hits).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Imagenette")
    parser.add_argument("--weights", type=Path, required=True, help="ImageNet weights of MobileNetV2 1.0")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.0025)
    parser.add_argument(
        "--attention-lr", type=float, help="learning rate of the attentions (default: that of the rest)"
    )
    parser.add_argument("--init", choices=["calm", "published"], default="calm", help="how attentions are drawn")
    parser.add_argument(
        "--temp-init", type=float, help="temperature that falls to 1 (default: that of the start, kept)"
    )
    parser.add_argument("--temp-share", type=float, default=0.5, help="share of the run in which it falls to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="take only so many images of each split, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune.csv")
    args = parser.parse_args()
    data = open_data(args.data, image_size=96, resize_size=96, min_scale=0.35)
    command = shlex.join(["python", "benchmarks/finetune.py", *sys.argv[1:]])
    sheet = Sheet(args.out, KEYS)
    for start in args.starts:
        model = build(start, args.init, args.weights, len(data.classes), args.seed)
        temperature = args.temp_init or find_temperature(model) or 1.0
        attentions = [p for module in model.modules() if isinstance(module, Attention) for p in module.parameters()]
        rest = [p for p in model.parameters() if all(p is not own for own in attentions)]
        groups = [
            {"params": rest},
            {"params": attentions, "lr": args.attention_lr or args.lr},
        ]
        optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9, weight_decay=4e-5)
        train = training_loader(some(data.train, args.images, args.seed), 64, seed=args.seed)
        val = evaluation_loader(some(data.val, args.images, args.seed), 100)
        steps = args.epochs * len(train)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step, steps=steps: (1 + cos(pi * step / steps)) / 2
        )
        for epoch in range(1, args.epochs + 1):
            model.train()
            train.sampler.set_epoch(epoch)
            losses = []
            for images, labels in train:
                if args.temp_init:
                    left = 1 - ((epoch - 1) * len(train) + len(losses)) / (args.temp_share * steps)
                    try_temperature(model, 1 + (args.temp_init - 1) * max(0, left))
                loss = F.cross_entropy(model(normalise(images)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            row = {
                "network": "mobilenetv2_100",
                "start": start,
                "init": args.init if STARTS[start] else "",
                "parameters": sum(p.numel() for p in model.parameters()),
                "seed": args.seed,
                "lr": args.lr,
                "attention_lr": args.attention_lr or args.lr,
                "temp_init": temperature,
                "temp_share": args.temp_share,
                "epochs": args.epochs,
                "epoch": epoch,
                "train_loss": f"{sum(losses) / len(losses):.4f}",
                "top1": f"{top1(model, val):.2f}",
            }
            print(*row.values(), flush=True)
            sheet.add([row | origin() | {"command": command}])


if __name__ == "__main__":
    main()
