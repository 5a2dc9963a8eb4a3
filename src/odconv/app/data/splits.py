"""Opening a data set: which form it has, its training and validation images, and its classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import make_dataset

from odconv.app.data.archives import find_archive, unpack
from odconv.app.data.images import Images, Sources, is_image_name, read_pixels
from odconv.app.data.shards import is_sharded, open_shards
from odconv.app.data.transforms import Augment, evaluation_transform, training_transform
from odconv.system.text import first_few


@dataclass(frozen=True)
class Splits:
    """A data set, opened: images to train on, if they were asked for, and to evaluate on, and names of the classes."""

    train: Images | None
    val: Images
    classes: list[str]


Labelled = tuple[Sources, Sequence[int] | np.ndarray]
"""Images and their labels."""
Opened = tuple[Labelled | None, Labelled, list[str]]
"""Images to train on, if they were asked for, and to evaluate on, and the names of the classes."""


def open_data(
    data: str | Path,
    *,
    image_size: int = 224,
    resize_size: int | None = None,
    augment: Augment = "imagenet",
    min_scale: float = 0.08,
    need_train: bool = True,
    cache: str | Path | None = None,
) -> Splits:
    """Open a data set for classification.

    Items are pairs of bytes (3, image_size, image_size), which :func:`normalise` makes into what networks see, and a
    label. Classes are numbered in the order of their sorted names, as ImageNet's are.

    Args:
        data: a folder with train/ and val/ (or test/), each with a folder of images a class; or a folder with archives
            instead (train.tar.xz, val.zip and the like); or one with shards that `odconv pack` made, or its URL; or
            one where torchvision put CIFAR-10 (cifar-10-batches-py);
            or the word "digits" for the 8 x 8 digits that come with scikit-learn (1,437 and 360 images).
        image_size: side of the images, in pixels.
        resize_size: length of the shorter side before the centre is cropped in evaluation, in pixels; default: 8/7 of
            `image_size`, which is 256 for 224.
        augment: "imagenet", "randaugment", "small" or "none"; see :func:`training_transform`. Digits are never flipped.
        min_scale: smallest share of an image's area that "imagenet" cuts out.
        need_train: False to open the validation images alone; nothing else needs to be there then.
        cache: folder to unpack archives into; default as :func:`odconv.system.files.cache_folder`.

    Returns:
        The training and validation images and the names of the classes.

    Raises:
        FileNotFoundError: the folder, a split, or the images of a class are missing.
        ValueError: train and val have different classes, an archive is damaged, or an option is out of range.
        OSError: the cache cannot be written.
    """
    train_transform = training_transform(
        image_size, resize_size, augment, min_scale=min_scale, flip=str(data) != "digits"
    )
    val_transform = evaluation_transform(image_size, resize_size)
    train, val, classes = _open(data, need_train, cache)
    return Splits(
        train=Images(*train, train_transform, image_size, read_pixels) if train else None,
        val=Images(*val, val_transform, image_size),
        classes=classes,
    )


def imagenet_names() -> list[str]:
    """Return readable names of the 1,000 ImageNet classes, in the order of their sorted WordNet ids."""
    from torchvision.models import MobileNet_V2_Weights

    return list(MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])


def _open(data: str | Path, need_train: bool, cache: str | Path | None) -> Opened:
    if str(data) == "digits":
        return _open_digits()
    if is_sharded(data):
        train, val, classes = open_shards(data, need_train, cache)
        return (train, train.labels) if train else None, (val, val.labels), classes
    folder = Path(data)
    if not folder.exists():
        raise FileNotFoundError(f"the data folder {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"data must be a folder or the word 'digits', got the file {folder}")
    if folder.name == CIFAR10.base_folder:
        return _open_cifar10(folder.parent, need_train)
    if (folder / CIFAR10.base_folder).is_dir():
        return _open_cifar10(folder, need_train)
    return _open_folders(folder, need_train, cache)


def _open_digits() -> Opened:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # published as 0 .. 16
    train, val, train_labels, val_labels = train_test_split(
        images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    return (train, train_labels), (val, val_labels), [str(name) for name in digits.target_names]


def _open_cifar10(root: Path, need_train: bool) -> Opened:
    try:
        # torchvision compares checksums before it unpickles anything
        train, val = CIFAR10(root, train=True) if need_train else None, CIFAR10(root, train=False)
    except RuntimeError as error:
        raise ValueError(f"CIFAR-10 in {root / CIFAR10.base_folder} is incomplete or damaged: {error}") from error
    return (train.data, train.targets) if train else None, (val.data, val.targets), val.classes


def _open_folders(root: Path, need_train: bool, cache: str | Path | None) -> Opened:
    train_place, val_place = _find(root, "train"), _find(root, "val") or _find(root, "test")
    if not val_place or (need_train and not train_place):
        raise FileNotFoundError(_what_is_missing(root, need_train and not train_place, not val_place))
    val, classes = _list_images(val_place, cache)
    if not need_train or not train_place:
        return None, val, classes
    train, train_classes = _list_images(train_place, cache)
    if classes != train_classes:
        only_train, only_val = sorted({*train_classes} - {*classes}), sorted({*classes} - {*train_classes})
        raise ValueError(
            f"{train_place} and {val_place} have different classes; only in the first: "
            f"{first_few(only_train, none='nothing')}; only in the second: {first_few(only_val, none='nothing')}"
        )
    return train, val, classes


def _find(root: Path, split: str) -> Path | None:
    return folder if (folder := root / split).is_dir() else find_archive(root, split)


def _what_is_missing(root: Path, train: bool, val: bool) -> str:
    missing = " and no ".join(["train/"] * train + ["val/ (or test/)"] * val)
    names = [path.name for path in sorted(root.iterdir())]
    hint = " (nor an archive of that name, nor cifar-10-batches-py/)" if names else ""
    return f"the data folder {root} has no {missing}{hint}: it holds {first_few(names, none='nothing')}"


def _list_images(place: Path, cache: str | Path | None) -> tuple[Labelled, list[str]]:
    """List the images of a split, a folder or an archive, and the names of its classes."""
    folder = place if place.is_dir() else unpack(place, cache)
    classes = _class_names(folder)
    if place.is_file() and classes == [place.name.split(".")[0]]:  # val.zip with val/CLASS/... inside
        folder /= classes[0]
        classes = _class_names(folder)
    if not classes:
        flat = any(map(is_image_name, folder.iterdir()))
        hint = "; `odconv sort-val` sorts ImageNet's flat validation folder into classes" if flat else ""
        raise FileNotFoundError(f"{place} holds no class folders{hint}")
    samples = make_dataset(
        folder, {name: i for i, name in enumerate(classes)}, is_valid_file=is_image_name, allow_empty=True
    )
    sources, labels = [path for path, _ in samples], [label for _, label in samples]
    if len(used := set(labels)) < len(classes):
        empty = [name for label, name in enumerate(classes) if label not in used]
        raise FileNotFoundError(f"class folders without an image in {place}: {first_few(empty, none='nothing')}")
    return (sources, labels), classes


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
