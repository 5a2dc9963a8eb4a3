"""How new networks begin, by method and start: their logits, their shares, and how much they amplify.

    python -m benchmarks.gradients --data ../shared/data/imagenette96

Of each network, on one batch of 64 images with batch norm in training mode: the standard deviation of a logit over
images; the entropy of the shares, divided by log n; the share of the mixed kernels' energy that all images have in
common, multiplied through the layers (log10); the norm of the gradient; and by what factor a change of the pixels,
relative to them, changes the logits of the network (float64, median of five random directions).
"""

import argparse
from math import log, log10
from statistics import mean, median
from typing import Any

import torch
from benchmarks.common import RESULTS, origin, write_rows
from torch import Tensor, nn
from torch.nn import functional as F

import odconv
from odconv.app.data import normalise, open_data
from odconv.layers import Attention, Attentions, PerSampleConv, try_temperature
from odconv.layers.starts import SETTLED
from odconv.layers.warehouse_attention import try_blend

STARTS: dict[str, tuple[dict[str, Any], list[float]]] = {  # options, and the temperatures to look at
    "published": ({"init": "published"}, [30, 5, 1]),
    "calm": ({}, [1]),
}
METHODS: dict[str, tuple[str, int | None, dict[str, Any]]] = {  # prefix, number of kernels, options besides
    "static": ("", None, {}),
    "CondConv": ("cond_", 8, {}),
    "DyConv": ("dy_", 4, {}),
    "ODConv 1x": ("od_", 1, {}),
    "ODConv 4x": ("od_", 4, {}),
    "CondConv, settled": ("cond_", 8, SETTLED["condconv"]),
    "ODConv 1x, settled": ("od_", 1, SETTLED["odconv"]),
    "ODConv 4x, settled": ("od_", 4, SETTLED["odconv"]),
    "KernelWarehouse 1x": ("kw_", None, {"budget": 1}),
    "KernelWarehouse 4x": ("kw_", None, {"budget": 4}),
}
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


def spread(values: Tensor) -> float:
    """Standard deviation over images, (B, outputs), averaged over the outputs."""
    return values.std(0).square().mean().sqrt().item()


def logit_spread(attention: Attention, found: Attentions) -> float:
    """Standard deviation of a layer's logits over images, from its gates and shares; over all heads."""
    spreads = []
    for name, weights in found._asdict().items():
        if weights is None:
            continue
        if name == "kernel" and attention.kernel_gate == "softmax":
            logits = weights.clamp(min=1e-30).log()
            logits = logits - logits.mean(1, keepdim=True)  # softmax does not feel what all have in common
        else:
            gain = attention.kernel_gain if name == "kernel" else attention.gain
            logits = (weights.flatten(1) / gain).clamp(1e-7, 1 - 1e-7).logit()
        spreads.append(spread(logits))
    return mean(spreads)


def common_energy(layer: PerSampleConv, found: Attentions) -> float:
    """|mean of the mixed kernels over images|^2 / mean of |mixed kernel|^2."""
    mixed = layer.kernels(found, torch.float32)
    return (mixed.mean(0).square().sum() / mixed.square().flatten(1).sum(1).mean()).item()


@torch.no_grad()
def look(model: nn.Module, x: Tensor) -> dict[str, str]:
    """What the attentions of a new network are."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PerSampleConv)}
    if not layers:
        return {"logit_std": "", "entropy": "", "common": ""}
    found: dict[str, Attentions] = {}
    hooks = [
        layer.attention.register_forward_hook(
            lambda attention, _, given, name=name: found.update({name: attention.named(given)})
        )
        for name, layer in layers.items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    # shares of cells come of no softmax, and have neither such logits nor an entropy
    own = {name: layer.attention for name, layer in layers.items() if isinstance(layer.attention, Attention)}
    shares = [a / a.sum(1, keepdim=True) for name in own if (a := found[name].kernel) is not None]
    entropies = [-(s * s.clamp(min=1e-30).log()).sum(1).mean().item() / log(s.shape[1]) for s in shares]
    spreads = [logit_spread(attention, found[name]) for name, attention in own.items()]
    return {
        "logit_std": f"{mean(spreads):.3g}" if spreads else "",
        "entropy": f"{mean(entropies):.3f}" if entropies else "",
        "common": f"{sum(log10(common_energy(layer, found[name])) for name, layer in layers.items()):.3g}",
    }


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
        for method, (prefix, n, besides) in METHODS.items():
            for start, (options, temperatures) in STARTS.items() if prefix else [("", ({}, [1.0]))]:
                if start == "published" and besides in SETTLED.values():
                    continue
                for temperature in temperatures if prefix in ("od_", "dy_") else [1]:
                    torch.manual_seed(0)
                    chosen = {"kernel_num": n, "num_classes": 10} | options | besides
                    model = odconv.create_model(prefix + network, **chosen).train()
                    try_temperature(model, temperature)
                    try_blend(model, 0.0)
                    row = {"network": network, "method": method, "start": start, "temperature": temperature}
                    row |= look(model, x)
                    row["gradient_norm"] = f"{gradient_norm(model, x, labels):.4g}"
                    row["amplification"] = f"{amplification(model, x):.4g}"
                    print(*row.values(), sep="\t", flush=True)
                    rows.append(row | origin())
    write_rows(RESULTS / "gradients.csv", rows)


if __name__ == "__main__":
    main()
