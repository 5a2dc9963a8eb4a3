"""Packing folders of images into shards."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import tarfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress

from odconv.app.data.archives import find_archive
from odconv.app.data.images import LARGEST, Images
from odconv.app.data.index_shards import describe, report
from odconv.app.data.parallel import each
from odconv.app.data.shard_index import VERSION, Index, Shard
from odconv.app.data.splits import open_data
from odconv.system.files import check_writable, open_regular, replacing

RECORDS = ".pack"
"""Folder of what is known of each finished shard, until the index is written."""
LOCK_WAIT = 5.0
"""Seconds; the workers of a run that was killed hold its lock for a moment longer."""


class Job(NamedTuple):
    """A shard to be packed: its file, the number of its first image, files, labels, and the set it belongs to."""

    path: Path
    first: int
    sources: list[str]
    labels: list[int]
    classes: list[str]
    fingerprint: str


def pack(*, data: str, out: str, shard_mb: float = 128.0, seed: int = 0, workers: int | None = None) -> None:
    """Pack a folder of images into shards: tar files that odconv and webdataset read, with an index for each split.

    Images are copied byte for byte, in a shuffled order. A run that was broken off can be started again: finished
    shards stay. Damaged images are packed as they are, counted and named.

    Args:
        data: a folder with train/ and val/ (or test/), or archives of these, as `odconv train` takes them; without
            train/, val/ alone is packed.
        out: folder for the shards (train-00000.tar and so on) and the indices train.json and val.json.
        shard_mb: size of a shard in 10^6 bytes, about; the shards of a split hold equally many images.
        seed: seed of the order.
        workers: number of processes; default one a core.

    Raises:
        ValueError: `data` holds no image files, `out` holds other shards, or an option is out of range.
    """
    if not 0 < shard_mb < math.inf:
        raise ValueError(f"shard_mb must be above 0, got {shard_mb}")
    root, folder = Path(data), Path(out)
    splits = open_data(data, need_train=(root / "train").is_dir() or find_archive(root, "train") is not None)
    check_writable(folder)
    try:
        with FileLock(folder / ".lock", timeout=LOCK_WAIT):
            for name, images in (("train", splits.train), ("val", splits.val)):
                if images is not None:
                    _pack_split(_plan(folder, name, images, splits.classes, shard_mb, seed), workers)
            shutil.rmtree(folder / RECORDS)
    except Timeout as error:
        raise OSError(f"another process packs into {folder}") from error


def _plan(folder: Path, name: str, images: Images, classes: list[str], shard_mb: float, seed: int) -> list[Job]:
    """Shuffle the images and share them out among shards, alike in every run."""
    if not isinstance(images.sources, list):
        raise ValueError("pack takes folders or archives of images, and neither arrays nor shards")
    root = os.path.commonpath(images.sources)
    samples = sorted(  # by a hash, which no version of a random generator changes
        (hashlib.sha256(b"%d/" % seed + os.fsencode(os.path.relpath(path, root))).hexdigest(), path, label)
        for path, label in zip(images.sources, images.labels, strict=True)
    )
    sizes = [os.stat(path).st_size for _, path, _ in samples]
    blocks = sum(math.ceil(size / tarfile.BLOCKSIZE) + 3 for size in sizes)  # with two headers and a label
    count = min(math.ceil(blocks * tarfile.BLOCKSIZE / (shard_mb * 1e6)), len(samples))
    bounds = [len(samples) * i // count for i in range(count + 1)]
    known = [VERSION, bounds, classes, [(key, label) for key, _, label in samples], sizes]
    fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return [
        Job(
            folder / f"{name}-{i:05d}.tar",
            first,
            [path for _, path, _ in samples[first:end]],
            [label for _, _, label in samples[first:end]],
            classes,
            fingerprint,
        )
        for i, (first, end) in enumerate(pairwise(bounds))
    ]


def _pack_split(jobs: Sequence[Job], workers: int | None) -> None:
    began = time.perf_counter()
    folder, name = jobs[0].path.parent, jobs[0].path.name.partition("-")[0]
    finished = _finished(folder, name, jobs[0].fingerprint)
    todo = [job for job in jobs if job.path.name not in finished]
    for left_over in folder.glob(f".{name}-*.partial"):  # by a run that was killed
        left_over.unlink()
    (folder / RECORDS).mkdir(exist_ok=True)
    # no refreshing from a thread: it would be copied into the processes
    with Progress(console=Console(stderr=True), auto_refresh=False, disable=not os.isatty(2)) as progress:
        bar = progress.add_task(name, total=len(jobs), completed=len(finished))
        for shard in each(_pack_shard, todo, workers):
            finished[shard.file] = shard
            progress.update(bar, advance=1, refresh=True)
    shards = [finished[job.path.name] for job in jobs]
    Index(jobs[0].classes, shards, jobs[0].fingerprint).write(folder / f"{name}.json")
    report(name, shards, sum(len(job.labels) for job in todo), time.perf_counter() - began)


def _finished(folder: Path, name: str, fingerprint: str) -> dict[str, Shard]:
    """Find the shards that earlier runs packed, and refuse those of another set."""
    known: dict[str, Shard] = {}
    for path in [folder / f"{name}.json", *folder.glob(f"{RECORDS}/{name}-*.json")]:
        if path.is_file():
            index = Index.parse(path.read_bytes(), path)
            if index.fingerprint != fingerprint:
                raise ValueError(f"{folder} holds shards of other images or options ({path}); name another folder")
            known |= {shard.file: shard for shard in index.shards}
    sizes = {path.name: path.stat().st_size for path in folder.glob(f"{name}-*.tar")}
    if foreign := sorted(sizes.keys() - known.keys()):
        raise ValueError(f"{folder} holds {foreign[0]}, which is not of this set; name another folder")
    return {file: shard for file, shard in known.items() if sizes.get(file) == shard.size}


def _pack_shard(job: Job) -> Shard:
    with replacing(job.path) as partial:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (source, label) in enumerate(zip(job.sources, job.labels, strict=True), start=job.first):
                key, suffix = _name(number, source)
                _add(tar, f"{key}{suffix}", _content(source))
                _add(tar, f"{key}.cls", str(label).encode())
        shard = describe(partial, job.path.name)
        # before the shard has its name: one without a record is not ours
        Index(job.classes, [shard], job.fingerprint).write(job.path.parent / RECORDS / f"{job.path.stem}.json")
    return shard


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner, so that a shard is the same wherever it is packed
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _name(number: int, source: str) -> tuple[str, str]:
    """Return key and suffix of an image; webdataset ends a key at its first dot."""
    stem, suffix = os.path.splitext(os.path.basename(source))
    return f"{number:08d}-{re.sub('[^A-Za-z0-9_-]', '_', stem)[:60]}", suffix


def _content(source: str) -> bytes:
    try:
        with open_regular(source, LARGEST) as file:
            return file.read()
    except OSError as error:
        raise OSError(f"the image {source} cannot be read: {error.strerror or error}") from error
