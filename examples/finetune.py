"""A pretrained classifier of torchvision, made dynamic where it is, and fine-tuned on scikit-learn's digits.

python examples/finetune.py                                  fetches MobileNetV2's ImageNet weights
python examples/finetune.py --weights mobilenet_v2.pth       takes those that you have
"""

import argparse

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn

import odconv


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 3, 32, 32) between -1 and 1, in a random order that is always the same, and labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    return images, torch.tensor(data.target)[order]


def network(weights: str | None) -> nn.Module:
    """MobileNetV2 for ten classes. Converted, it computes what it did before: a warm start."""
    model = torchvision.models.mobilenet_v2(weights="DEFAULT" if weights is None else None)
    if weights is not None:
        odconv.load_checkpoint(model, weights)
    model.classifier[1] = nn.Linear(model.last_channel, 10)
    return odconv.convert(model, "odconv", kernel_num=1)


def train(weights: str | None = None, steps: int = 120) -> float:
    """Fine-tune on 1,200 digits; return the accuracy on the others, in %."""
    torch.manual_seed(0)
    images, labels = digits()
    model = network(weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=4e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(1200, (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        return 100 * (model.eval()(images[1200:]).argmax(1) == labels[1200:]).double().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="file of MobileNetV2's weights")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    print(f"{train(options.weights, options.steps):.1f} % of 597 digits are right")
