"""A network of your own in three dimensions: find the balls in noisy volumes, one volume at a time, as in medicine.

python examples/volumes.py --steps 100
"""

import argparse

import torch
from torch import Tensor, nn

import odconv

SIDE = 16


def volume(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A ball in noise, (1, 1, SIDE, SIDE, SIDE), and where it is, 0 or 1 in the same shape."""
    centre, radius = SIDE * (0.3 + 0.4 * torch.rand(3, 1, 1, 1, generator=generator)), SIDE / 5
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIDE)] * 3, indexing="ij"))
    inside = ((grid - centre).norm(dim=0) < radius).float()[None, None]
    return inside + 0.5 * torch.randn(inside.shape, generator=generator), inside


def network() -> nn.Module:
    """A small encoder and decoder, static as one would write it; then all but its first convolution become dynamic."""
    model = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.ReLU(),
        nn.Conv3d(8, 16, 3, stride=2, padding=1), nn.InstanceNorm3d(16, affine=True), nn.ReLU(),
        nn.Conv3d(16, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True), nn.ReLU(),
        nn.ConvTranspose3d(16, 1, 2, stride=2),
    )  # fmt: skip
    return odconv.convert(model, kernel_num=2, warm_start=False)


def overlap(found: Tensor, inside: Tensor) -> float:
    """Return Dice's coefficient: 1 where both are the same, 0 where they have nothing in common."""
    return (2 * (found * inside).sum() / (found.sum() + inside.sum())).item()


def train(steps: int = 100) -> float:
    """Train with a batch of one; return the mean overlap on ten other volumes."""
    torch.manual_seed(0)
    model, generator = network(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(odconv.parameter_groups(model, lr=5e-3, weight_decay=0.01))
    for _ in range(steps):
        voxels, inside = volume(generator)
        loss = nn.functional.binary_cross_entropy_with_logits(model(voxels), inside)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        tests = [volume(generator) for _ in range(10)]
        return sum(overlap((model.eval()(voxels) > 0).float(), inside) for voxels, inside in tests) / len(tests)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    print(f"Dice's coefficient on ten new volumes: {train(parser.parse_args().steps):.3f}")
