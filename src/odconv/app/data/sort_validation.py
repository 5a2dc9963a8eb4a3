"""Sorting ImageNet's flat validation folder into class folders."""

import os
import re
from pathlib import Path

IMAGE_NAME = re.compile(r"ILSVRC2012_val_\d{8}")
WNID = re.compile(r"\bn\d{8}\b")


def sort_validation(*, folder: str, labels: str, meta: str | None = None, out: str | None = None) -> None:
    """Sort ImageNet's flat validation folder (ILSVRC2012_val_00000001.JPEG ...) into class folders.

    Nothing is moved unless every image is there and has a label. A run that was broken off can be started again.

    Args:
        folder: the folder with the images.
        labels: a text file with an image's name and its WordNet id (n01440764) in each line, in any format: Kaggle's
            LOC_val_solution.csv, a plain list, valprep.sh. Or the devkit's ILSVRC2012_validation_ground_truth.txt,
            which holds numbers alone.
        meta: what those numbers mean: the devkit's meta.mat, or a text file with a number and a WordNet id in each
            line. Default: the meta.mat beside `labels`.
        out: folder to make with symbolic links to the images. Default: move the images within `folder`.

    Raises:
        FileNotFoundError: a file or folder is missing, or images that have a label; names the first.
        ValueError: a file of labels that cannot be understood, or images without a label; names the first.
    """
    root, target = Path(folder), Path(out or folder)
    if not root.is_dir():
        raise FileNotFoundError(f"the folder {root} does not exist")
    wnids = _read_labels(Path(labels), Path(meta) if meta else None)
    flat = {path.stem: path for path in sorted(root.glob("ILSVRC2012_val_*")) if path.is_file()}
    if unlabelled := sorted(flat.keys() - wnids.keys()):
        raise ValueError(f"{len(unlabelled)} images in {root} have no label in {labels}; first: {unlabelled[0]}")
    sorted_before = {
        path.stem for path in target.glob("n*/ILSVRC2012_val_*") if wnids.get(path.stem) == path.parent.name
    }
    if missing := sorted(wnids.keys() - flat.keys() - sorted_before):
        raise FileNotFoundError(
            f"{len(missing)} of {len(wnids)} images of {labels} are not in {root}; first: {missing[0]}"
        )
    todo = sorted(flat.keys() - sorted_before)
    for name in todo:
        place = target / wnids[name] / flat[name].name
        place.parent.mkdir(parents=True, exist_ok=True)
        if out:
            place.symlink_to(flat[name].resolve())
        else:
            os.rename(flat[name], place)
    done, classes = "linked" if out else "moved", len(set(wnids.values()))
    print(f"{len(todo)} images {done}, {len(sorted_before)} were in place already: {classes} classes in {target}")


def _read_labels(path: Path, meta: Path | None) -> dict[str, str]:
    """Read the WordNet id of each image, by its name without a suffix."""
    lines = _read_text(path).split("\n")
    numbers = [line.strip() for line in lines if line.strip()]
    if numbers and all(number.isdigit() for number in numbers):
        wnids = _read_meta(meta or path.with_name("meta.mat"))
        if unknown := set(map(int, numbers)) - wnids.keys():
            raise ValueError(f"{path} has the class number {min(unknown)}, which {meta or 'meta.mat'} does not")
        return {f"ILSVRC2012_val_{i:08d}": wnids[int(number)] for i, number in enumerate(numbers, start=1)}
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if name := IMAGE_NAME.search(line):
            if not (wnid := WNID.search(line)):
                raise ValueError(f"{path}, line {number}: no WordNet id such as n01440764 in {line[:80]!r}")
            found[name[0]] = wnid[0]
    if not found:
        raise ValueError(f"{path} names no image such as ILSVRC2012_val_00000001 and is no list of class numbers")
    return found


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"the file of labels {path} does not exist")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file") from error


def _read_meta(path: Path) -> dict[int, str]:
    """Read the WordNet id of each of the devkit's class numbers, which are not in the order of the ids."""
    if not path.is_file():
        raise FileNotFoundError(
            f"class numbers need the devkit's meta.mat (or a text file with a number and a WordNet id in each line), "
            f"and {path} does not exist"
        )
    if path.suffix == ".mat":
        from scipy.io import loadmat  # type: ignore[import-untyped]

        try:
            synsets = loadmat(path, squeeze_me=True)["synsets"]
            return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        except Exception as error:  # on damaged files loadmat raises about everything
            raise ValueError(f"{path} is not the devkit's meta.mat, or damaged: {error}") from error
    rows = re.findall(r"^\s*(\d+)\W+(n\d{8})\b", _read_text(path), re.MULTILINE)
    if not rows:
        raise ValueError(f"{path} has no line with a number and a WordNet id, such as '1 n02119789'")
    return {int(number): wnid for number, wnid in rows}
