"""Saying what is on images."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from odconv.train.config import check
from odconv.train.restore import Restored, restore


def predict(images: list[str], *, weights: str, top: int = 5, **network: Any) -> dict[str, dict[str, float]]:
    """Say what is on images: print the most probable classes of each.

    Args:
        images: Files, folders, or patterns such as 'photos/*.jpg'.
        weights: A checkpoint of odconv train, which says what network it is, or another file of weights.
        top: How many classes to print.
        **network: What the checkpoint does not say; see :func:`odconv.train.restore.restore`.

    Returns:
        Of each image, the probability of the most probable classes, in %. Files that cannot be read are named and left
        out.

    Raises:
        ValueError: an option or weights that do not fit, or no image at all can be read.
        OSError: the weights cannot be read.
    """
    import torch

    from odconv.data import evaluation_transform, normalise

    check({"top": top})
    restored = restore(weights, **network)
    names, transform = _names(restored), evaluation_transform(restored.image_size, restored.resize_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = restored.model.to(device)
    found: dict[str, dict[str, float]] = {}
    for path, image in readable(images):
        with torch.inference_mode():
            probabilities = model(normalise(transform(image)[None].to(device)))[0].float().softmax(dim=0)
        best = probabilities.topk(min(top, len(names)))
        found[str(path)] = {names[i]: 100 * p for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)}
        print(path, *(f"{p:6.2f} %  {name}" for name, p in found[str(path)].items()), sep="\n  ")
    if not found:
        raise ValueError("none of the images can be read")
    return found


def readable(images: Iterable[str]) -> Iterator[tuple[Path, Any]]:
    """Yield the images, and name those that cannot be read."""
    from odconv.data import find_images, read_image

    for pattern in images:
        try:
            paths = find_images([pattern])
        except OSError as error:
            print(error, file=sys.stderr)
            continue
        for path in paths:
            try:
                image = read_image(path)
            except OSError as error:
                print(error, file=sys.stderr)
            else:
                yield path, image


def _names(restored: Restored) -> list[str]:
    from odconv.data import imagenet_names

    if restored.num_classes == 1000 and (not restored.classes or restored.classes[0] == "n01440764"):
        return imagenet_names()  # of ImageNet's folders, which are called by WordNet ids
    known = restored.classes or []
    return known + [f"class {i}" for i in range(len(known), restored.num_classes)]
