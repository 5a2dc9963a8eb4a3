"""A detector in a training loop of your own: Faster R-CNN on a dynamic backbone finds discs and squares.

python examples/detect.py --steps 100
"""

import argparse

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

import odconv

SIDE = 96
FEW = {"rpn_post_nms_top_n_train": 100, "rpn_post_nms_top_n_test": 50, "box_batch_size_per_image": 32}  # proposals


def scene(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """A noisy image (3, SIDE, SIDE) with two objects, and their boxes and labels: 1 for squares, 2 for discs."""
    image = 0.3 * torch.rand(3, SIDE, SIDE, generator=generator)
    boxes, labels = [], []
    for left in (0, SIDE // 2):
        radius, x, y = (int(torch.randint(*span, (), generator=generator)) for span in ((12, 18), (20, 28), (20, 76)))
        disc = bool(torch.rand((), generator=generator) < 0.5)
        dx, dy = (torch.arange(SIDE) - x - left).abs(), (torch.arange(SIDE)[:, None] - y).abs()
        inside = dx**2 + dy**2 <= radius**2 if disc else torch.maximum(dx, dy) <= radius
        image = torch.where(inside, 0.6 + 0.4 * torch.rand(3, 1, 1, generator=generator), image)
        boxes.append([x + left - radius, y - radius, x + left + radius + 1, y + radius + 1])
        labels.append(1 + disc)
    return image, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


def train(steps: int = 100) -> float:
    """Train on new scenes, four a step; return which share of the objects in 20 others is found, in %."""
    generator, sizes = torch.manual_seed(0), {"min_size": SIDE, "max_size": SIDE, "anchor_sizes": [16, 24, 32, 48, 96]}
    learning = {"num_classes": 3, "frozen_stages": 0, "norm_eval": False}  # no classifier's weights to keep
    detector = odconv.create_detector("faster_rcnn", "odl_resnet18", kernel_num=1, **learning, **sizes, **FEW)
    optimizer = torch.optim.SGD(odconv.parameter_groups(detector, lr=0.01, weight_decay=1e-4), momentum=0.9)
    for _ in range(steps):
        loss = sum(detector(*zip(*(scene(generator) for _ in range(4)), strict=True)).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
    right = 0
    with torch.inference_mode():
        for image, target in (scene(generator) for _ in range(20)):
            (found,) = detector.eval()([image])
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                sure = (found["labels"] == label) & (found["scores"] > 0.5)
                right += bool((box_iou(box[None], found["boxes"][sure]) > 0.5).any())
    return 100 * right / 40


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    print(f"{train(parser.parse_args().steps):.0f} % of the objects in 20 new scenes are found")
