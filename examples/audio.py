"""A network of your own in one dimension: which of five pitches is in half a second of noisy sound.

python examples/audio.py --steps 60
"""

import argparse
from math import pi

import torch
from torch import Tensor, nn

import odconv

RATE, LENGTH = 4000, 2000
PITCHES = torch.tensor([220.0, 277.2, 329.6, 392.0, 466.2])  # in Hz


def sounds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tones with a random phase and loudness in noise, (count, 1, LENGTH), and which pitch each has."""
    labels = torch.randint(len(PITCHES), (count,), generator=generator)
    phase, loudness = torch.rand(2, count, 1, generator=generator)
    time = torch.arange(LENGTH) / RATE
    tones = (0.3 + loudness) * torch.sin(2 * pi * (PITCHES[labels, None] * time + phase))
    return (tones + torch.randn(count, LENGTH, generator=generator))[:, None], labels


def network() -> nn.Module:
    """A static convolution first, then dynamic ones; norm="layer" and the two gains are the settled start."""
    settled = {"norm": "layer", "gain": 2.0, "kernel_gain": "sqrt"}
    return nn.Sequential(
        nn.Conv1d(1, 16, 64, stride=4), nn.BatchNorm1d(16), nn.ReLU(),
        odconv.ODConv1d(16, 32, 9, stride=4, kernel_num=4, **settled), nn.BatchNorm1d(32), nn.ReLU(),
        odconv.ODConv1d(32, 32, 9, stride=4, kernel_num=4, **settled), nn.BatchNorm1d(32), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, len(PITCHES)),
    )  # fmt: skip


def train(steps: int = 60) -> float:
    """Train on new sounds at every step; return the accuracy on others, in %."""
    torch.manual_seed(0)
    model, generator = network(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(odconv.parameter_groups(model, lr=3e-3, weight_decay=0.01))
    for _ in range(steps):
        clips, labels = sounds(16, generator)
        loss = nn.functional.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clips, labels = sounds(200, generator)
    with torch.inference_mode():
        return 100 * (model.eval()(clips).argmax(1) == labels).double().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    print(f"{train(parser.parse_args().steps):.1f} % of 200 new sounds are right")
