"""How new networks amplify, by temperature: why dynamic convolutions are trained from 30 down.

    python -m benchmarks.gradients --data ../shared/data/imagenette96

Of each network, on one batch with batch norm in training mode: the norm of the gradient; the same with no gradient
through the input of the attentions; and by what factor a change of the pixels, relative to them, changes the logits
(float64, median of five random directions).
"""

import argparse
from statistics import median

import torch
from benchmarks.accuracy.networks import build
from benchmarks.common import RESULTS, origin, write_rows
from torch import Tensor, nn
from torch.nn import functional as F

import odconv
from odconv.data import normalise, open_data
from odconv.layers import Attention

METHODS = ("static", "condconv", "dyconv", "odconv_1x", "odconv_4x")
VARIANTS = ("reduction_4", "reduction_8", "reduction_32", "norm_group", "norm_layer", "norm_none")
"""Ablations of ODConv 4x."""
NUDGE = 1e-9
"""Of the pixels, relative to them: small enough that the answer is proportional."""


def gradient_norm(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    F.cross_entropy(model(x), labels).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    model.zero_grad()
    return norm


@torch.no_grad()
def amplification(model: nn.Module, x: Tensor) -> float:
    model, x = model.double(), x.double()
    logits, random = model(x), torch.Generator().manual_seed(0)
    factors = []
    for _ in range(5):
        direction = torch.randn(x.shape, generator=random, dtype=x.dtype)
        change = model(x + NUDGE * x.norm() / direction.norm() * direction) - logits
        factors.append((change.norm() / logits.norm() / NUDGE).item())
    return median(factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Imagenette")
    parser.add_argument("--models", nargs="+", default=["mobilenetv2_050", "resnet18"])
    args = parser.parse_args()
    torch.manual_seed(0)
    images = open_data(args.data, image_size=96, resize_size=96, min_scale=0.35).train
    batch = [images[index] for index in torch.randperm(len(images))[:64].tolist()]
    x, labels = normalise(torch.stack([image for image, _ in batch])), torch.tensor([label for _, label in batch])
    rows = []
    for network in args.models:
        for method in METHODS + VARIANTS:
            for temperature in [1] if method in ("static", "condconv") else [30, 15, 5, 1]:
                torch.manual_seed(0)
                model = build(network, method, "standard", 10)
                odconv.set_temperature(model, temperature)
                row = {"network": network, "method": method, "temperature": temperature}
                row["gradient_norm"] = f"{gradient_norm(model, x, labels):.4g}"
                for attention in model.modules():
                    if isinstance(attention, Attention):
                        attention.register_forward_pre_hook(lambda _, inputs: tuple(x.detach() for x in inputs))
                row["stopped_norm"] = f"{gradient_norm(model, x, labels):.4g}"
                row["amplification"] = f"{amplification(model, x):.4g}"
                print(*row.values(), flush=True)
                rows.append(row | origin())
    write_rows(RESULTS / "gradients.csv", rows)


if __name__ == "__main__":
    main()
