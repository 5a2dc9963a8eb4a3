"""The images to look at: found, chosen evenly from their classes, and read."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from odconv.app.data import evaluation_transform, find_existing, read_image


class Pictures(NamedTuple):
    """Images that were read, as bytes (B, 3, side, side), and the class of each; None where it is not known of all."""

    paths: list[Path]
    pixels: Tensor
    classes: list[str] | None


def find(images: Iterable[str], known: Sequence[str]) -> tuple[list[Path], list[str] | None]:
    """Find image files and their classes: folders with the name of a known class, or else subfolders of a given one.

    The files are sorted by class; None for classes where a file has none, or all have the same. What is missing is
    named.
    """
    found: dict[Path, str | None] = {}
    for given in images:
        paths, missing = find_existing([given])
        for reason in missing.values():
            print(reason, file=sys.stderr)
        for path in paths:
            inside = path.relative_to(given).parts[:-1] if Path(given).is_dir() else ()
            parent = path.absolute().parent.name
            found.setdefault(path, parent if parent in known else inside[0] if inside else None)
    named = {path: name for path, name in found.items() if name is not None}
    if len(named) < len(found) or len({*named.values()}) < 2:
        return list(found), None
    order = {name: place for place, name in enumerate(known)}  # the other classes follow by their names
    paths = sorted(named, key=lambda path: (order.get(named[path], len(known)), named[path], path))
    return paths, [named[path] for path in paths]


def choose(classes: Sequence[str], most: int) -> list[int]:
    """Choose so many items at most: about equally many of each class, evenly spread over it, in their order."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(classes):
        groups.setdefault(name, []).append(index)
    chosen: list[int] = []
    for rank, group in enumerate(sorted(groups.values(), key=len)):
        take = min(len(group), (most - len(chosen)) // (len(groups) - rank))
        chosen += [group[index * len(group) // take] for index in range(take)]
    return sorted(chosen)


def read(
    images: Iterable[str], known: Sequence[str], answers: Sequence[str], most: int, image_size: int, resize_size: int
) -> Pictures:
    """Read at most so many images; those that cannot be read are named and left out. A ValueError if two do not remain.

    `known` are the names of the folders of the network's classes, if they are known; `answers` what its outputs are
    called, which name folders that are not known, in their order, where there are as many.
    """
    transform = evaluation_transform(image_size, resize_size)
    paths, classes = find(images, known)
    pixels: dict[int, Tensor] = {}
    for index in choose(classes or [""] * len(paths), most):
        try:
            pixels[index] = transform(read_image(paths[index], upright=True))
        except OSError as error:
            print(error, file=sys.stderr)
    if len(pixels) < 2:
        raise ValueError(f"images must name at least two that can be read, got {len(pixels)}")
    folders = known or sorted({*(classes or [])})
    names = dict(zip(folders, answers, strict=False)) if known or len(folders) == len(answers) else {}
    kept = [names.get(classes[index], classes[index]) for index in pixels] if classes else None
    if kept and len({*kept}) < 2:
        kept = None
    return Pictures([paths[index] for index in pixels], torch.stack(list(pixels.values())), kept)
