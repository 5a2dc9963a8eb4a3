"""Images to begin with: the user's own, or some that come with scikit-learn."""

import shutil
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from odconv.app.data import find_images, open_data, read_image
from odconv.app.demo.uploads import read_upload

MOST = 12
"""Examples on the page."""


class Examples(NamedTuple):
    """Copies of images, and whose they are."""

    files: list[Path]
    source: str


def make_examples(folder: str | None, classes: Sequence[str], place: Path) -> Examples:
    """Copy images to an empty folder from where they may be shown.

    They are the first twelve of the user's folder that can be read. Without one: for networks that know digits, a
    handwritten one of each kind; else two photos.
    """
    if folder is not None:
        return Examples(copy_readable(find_images([folder]), place), "your own")
    if list(classes) == [*"0123456789"]:
        return Examples(write_digits(place), "digits of the UCI repository, CC BY 4.0")
    photos = [Path(str(resources.files("sklearn.datasets.images") / name)) for name in ("china.jpg", "flower.jpg")]
    return Examples(copy_readable(photos, place), "photos by danielbuechele and vultilion, CC BY 2.0")


def copy_readable(paths: Sequence[Path], place: Path) -> list[Path]:
    """Copy the first images that can be read, and name those that cannot."""
    copies: list[Path] = []
    for path in paths:
        try:
            read_upload(path)
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        folder = place / str(len(copies))  # of its own, for names may come twice
        folder.mkdir()
        copies.append(Path(shutil.copy(path, folder)))
        if len(copies) == MOST:
            break
    if not copies:
        raise FileNotFoundError(f"none of the images at {paths[0].parent} can be read")
    return copies


def write_digits(place: Path) -> list[Path]:
    """Write the first digit of each kind among those that are not trained on."""
    digits = open_data("digits", image_size=8, resize_size=8).val
    files = [place / f"{digit}.png" for digit in range(10)]
    for digit, file in enumerate(files):
        read_image(digits.sources[list(digits.labels).index(digit)]).save(file)
    return files
