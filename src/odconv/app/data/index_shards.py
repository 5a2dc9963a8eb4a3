"""Making the index of shards that were packed by others."""

import hashlib
import re
import tarfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from odconv.app.data.images import read_image
from odconv.app.data.parallel import each
from odconv.app.data.shard_index import SAFE_NAME, Index, Shard
from odconv.system.text import count, first_few

META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset keeps for itself."""
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""Key and extension, as webdataset splits them: at the first dot of the file's name."""


def index_shards(
    *,
    data: str,
    train: str = "*train*.tar",
    val: str = "*val*.tar",
    classes: str | None = None,
    workers: int | None = None,
) -> None:
    """Make train.json and val.json for shards that webdataset or another tool wrote.

    Each sample needs an image and its label: KEY.jpg (.jpeg, .png, .webp and so on) and KEY.cls, a number. Members that
    are neither are passed over; nothing is unpacked.

    Args:
        data: folder of the shards, uncompressed tar files.
        train: pattern of the shards to train on; where none fits, val.json alone is made.
        val: pattern of the shards to evaluate on.
        classes: a text file with the name of a class in each line, in the order of the labels. Default: the labels
            are the names.
        workers: number of processes; default one a core.

    Raises:
        ValueError: a shard is damaged, compressed or lacks a label; a label has no name; or there is an index already.
    """
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"the folder {root} does not exist")
    found = {name: sorted(root.glob(pattern)) for name, pattern in (("train", train), ("val", val))}
    if not found["val"]:
        raise FileNotFoundError(f"no shard in {root} is called {val}")
    if both := {*found["train"]} & {*found["val"]}:
        raise ValueError(f"{min(both)} fits both patterns, {train} and {val}")
    for name in found:
        if (root / f"{name}.json").exists():
            raise ValueError(f"there is an index {root / f'{name}.json'} already")
    if classes is not None and not Path(classes).is_file():
        raise FileNotFoundError(f"there is no file {classes} of names of classes")
    sets = {}
    for name, paths in found.items():
        began = time.perf_counter()
        places = [(path, path.relative_to(root).as_posix()) for path in paths]
        shards = sorted(each(_scan, places, workers), key=lambda shard: shard.file)
        if shards:
            report(name, shards, sum(len(shard.labels) for shard in shards), time.perf_counter() - began)
            sets[name] = shards
    names = _class_names(classes, max(max(shard.labels) for shards in sets.values() for shard in shards))
    for name, shards in sets.items():
        Index(names, shards).write(root / f"{name}.json")


def _class_names(path: str | None, highest: int) -> list[str]:
    if path is None:
        return [str(label) for label in range(highest + 1)]
    names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if highest >= len(names):
        raise ValueError(f"{path} has {len(names)} names, and there is a label {highest}")
    return names


def _scan(place: tuple[Path, str]) -> Shard:
    return describe(*place)


def describe(path: Path, name: str) -> Shard:
    """Find the images and labels of a shard, and compute all that an index, in which it has a name, holds of it.

    It is a ValueError if the file is damaged or compressed, or an image has no label.
    """
    if not SAFE_NAME.fullmatch(name):
        raise ValueError(f"the name of a shard may have letters, digits, spaces and .+=@,- only, got {name!r}")
    size = path.stat().st_size
    with path.open("rb") as file:
        members = _members(path, file, size)
        images, labels = _pair(path, file, members)
        crc32, unreadable = [], []
        for member in images.values():
            image = _read(file, member)
            crc32.append(zlib.crc32(image))
            try:
                read_image(image)
            except OSError:
                unreadable.append(member.name)
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return Shard(
        name,
        size,
        digest.hexdigest(),
        np.array([labels[key] for key in images]),
        np.array([member.offset_data for member in images.values()]),
        np.array([member.size for member in images.values()]),
        np.array(crc32),
        unreadable,
    )


def _members(path: Path, file: BinaryIO, size: int) -> list[tarfile.TarInfo]:
    """List the files in a tar file, which is seen to be whole."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = [member for member in tar if member.isreg() and not META.match(member.name)]
            end = tar.offset
    except Exception as error:  # on damaged files tarfile raises about everything
        raise ValueError(f"the shard {path} is damaged, or compressed: {error}") from error
    if any(member.issparse() or member.offset_data + member.size > size for member in members):
        raise ValueError(f"the shard {path} is cut short, or has a member with holes")
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile does not miss the zeros that end it
        raise ValueError(f"the shard {path} is cut short, or damaged at byte {end}")
    return members


def _pair(
    path: Path, file: BinaryIO, members: list[tarfile.TarInfo]
) -> tuple[dict[str, tarfile.TarInfo], dict[str, int]]:
    """Find image and label of each key."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    for member in members:
        if not (match := MEMBER.fullmatch(member.name)):
            continue
        key, extension = match[1], match[2].lower()
        if extension == "cls":
            if not re.fullmatch(rb"\s*[0-9]{1,6}\s*", text := _read(file, member, 16)):
                raise ValueError(f"{member.name} in {path} must hold a class number, got {text!r}")
            labels[key] = int(text)
        elif f".{extension}" in IMG_EXTENSIONS:
            if key in images:
                raise ValueError(f"the shard {path} has two images of the sample {key!r}")
            images[key] = member
    if not images:
        raise ValueError(f"the shard {path} holds no image")
    if unpaired := sorted(images.keys() ^ labels.keys()):
        raise ValueError(f"the shard {path} has no {'label' if unpaired[0] in images else 'image'} of {unpaired[0]!r}")
    return images, labels


def _read(file: BinaryIO, member: tarfile.TarInfo, limit: int | None = None) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size if limit is None else min(member.size, limit))


def report(name: str, shards: Sequence[Shard], images: int, seconds: float) -> None:
    """Print what a split holds, and how fast `images` of it were gone through."""
    total, size = sum(len(shard.labels) for shard in shards), sum(shard.size for shard in shards)
    speed = f"{images} of them in {seconds:.1f} s, {images / seconds:.0f} images/s" if images else "nothing left to do"
    print(f"{name}: {total} images in {count(len(shards), 'shard')} of {size} bytes in all; {speed}")
    if unreadable := [f"{shard.file}: {image}" for shard in shards for image in shard.unreadable]:
        print(f"{name}: {len(unreadable)} images are damaged and count as unreadable: {first_few(unreadable)}")
