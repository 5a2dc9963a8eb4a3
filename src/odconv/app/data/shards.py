"""Images in shards: tar files in webdataset's format, each image read with one seek, from a folder or a URL."""

import logging
import math
import os
import re
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, overload
from urllib.parse import quote

import numpy as np

from odconv.app.data.download import check_url, open_url, read_url
from odconv.app.data.shard_index import Index

CACHE_LIMIT = "ODCONV_CACHE_GB"
MAX_OPEN = 16
"""Shards that a process holds open."""
RETRY_AFTER = 600.0
"""Seconds until a shard that could not be had is asked for again."""

logger = logging.getLogger(__name__)


class ShardError(OSError):
    """A whole shard cannot be had; said in a warning when it was noticed, so no image of it needs another one."""


class Shards(Sequence[bytes]):
    """Images in shards, each the content of its file.

    Shards at a URL are downloaded into the cache, whole or not at all, when their first image is asked for. An object
    can be pickled and forked, and is for one thread at a time.

    Args:
        index: the index, train.json or val.json, in a folder or at http:// or https://. The shards lie beside it.
        cache: folder for downloads; default as :func:`odconv.system.files.cache_folder`.
        cache_gb: upper limit of the downloads kept, in 10^9 bytes; default $ODCONV_CACHE_GB, or none. Shards opened
            least recently are removed first.

    Attributes:
        classes: name of each class.
        labels: class index of each image (N,).
        sizes: number of images in each shard; the first sizes[0] images are those of the first shard, and so on.

    Raises:
        FileNotFoundError: there is no index.
        OSError: the index cannot be read.
        ValueError: the index is damaged or names a file outside its folder, or the URL or limit is not allowed.
    """

    def __init__(self, index: str | Path, *, cache: str | Path | None = None, cache_gb: float | None = None) -> None:
        self.place, self.cache, self.limit = index, cache, _to_bytes(cache_gb)
        contents = Index.parse(_read(index), index)
        self.classes, self.files = contents.classes, [(s.file, s.size, s.sha256) for s in contents.shards]
        self.labels, self._offsets, self._lengths, self._crc32 = (
            np.concatenate([getattr(shard, name) for shard in contents.shards])
            for name in ("labels", "offsets", "lengths", "crc32")
        )
        self.sizes = [len(shard.labels) for shard in contents.shards]
        self._ends = list(accumulate(self.sizes))
        self._forget()

    def _forget(self) -> None:
        self._opened: OrderedDict[int, BinaryIO] = OrderedDict()
        self._failed: dict[int, tuple[float, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_opened", "_failed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        """Read an image.

        Raises:
            ShardError: its shard is missing, cannot be downloaded, or has another size than the index says.
            OSError: its bytes are not what the index says, or cannot be read.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        shard = bisect_right(self._ends, index)
        offset, length = int(self._offsets[index]), int(self._lengths[index])
        image = _read_at(self._open(shard), offset, length)
        if zlib.crc32(image) != self._crc32[index]:
            raise OSError(
                f"image {index} at byte {offset} of {self.files[shard][0]} is damaged: not what {self.place} says"
            )
        return image

    def _open(self, shard: int) -> BinaryIO:
        if shard in self._opened:
            self._opened.move_to_end(shard)
            return self._opened[shard]
        if shard in self._failed and time.monotonic() < self._failed[shard][0] + RETRY_AFTER:
            raise ShardError(self._failed[shard][1])
        try:
            file = self._find(*self.files[shard])
        except OSError as error:
            message = f"the {self.sizes[shard]} images of a shard cannot be read: {error}"
            self._failed[shard] = time.monotonic(), message
            logger.warning("%s", message)
            raise ShardError(message) from error
        if len(self._opened) == MAX_OPEN:
            self._opened.popitem(last=False)[1].close()
        self._opened[shard] = file
        return file

    def _find(self, name: str, size: int, sha256: str) -> BinaryIO:
        if is_url(self.place):
            url = f"{str(self.place).rpartition('/')[0]}/{quote(name)}"
            return open_url(url, size, sha256, cache=self.cache, limit=self.limit)
        file = Path(self.place).parent.joinpath(name).open("rb")
        if (actual := os.fstat(file.fileno()).st_size) != size:
            file.close()
            raise OSError(f"{file.name} has {actual} bytes, and should have {size}: it is cut short or another file")
        return file


def open_shards(
    data: str | Path, need_train: bool = True, cache: str | Path | None = None
) -> tuple[Shards | None, Shards, list[str]]:
    """Open the shards of a folder, or its URL: images to train on, if they are needed, and to evaluate on, class names.

    It is a ValueError if the URL is not allowed, an index is damaged, or the two have different classes.
    """
    if is_url(data):
        check_url(str(data))
    root = str(data).rstrip("/")
    val = Shards(f"{root}/val.json", cache=cache)
    if not need_train:
        return None, val, val.classes
    train = Shards(f"{root}/train.json", cache=cache)
    if train.classes != val.classes:
        raise ValueError(f"train.json and val.json of {data} have different classes")
    return train, val, val.classes


def is_sharded(data: str | Path) -> bool:
    """Say whether data is a URL, or a folder with an index of shards."""
    return is_url(data) or any((Path(data) / f"{split}.json").is_file() for split in ("train", "val"))


def is_url(data: str | Path) -> bool:
    """Say whether data has a scheme, allowed or not, and is nothing that exists here."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", str(data))) and not Path(data).exists()


def _read(index: str | Path) -> bytes:
    if is_url(index):
        check_url(str(index))
        return read_url(str(index))
    if not Path(index).is_file():
        raise FileNotFoundError(f"there is no index of shards {index}; `odconv pack` and `odconv index` write one")
    return Path(index).read_bytes()


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """Read at a place, not from one on: processes forked from this one share the file's position."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), length, offset)
    file.seek(offset)  # Windows does not fork
    return file.read(length)


def _to_bytes(cache_gb: float | None) -> int | None:
    name, value = "cache_gb", str(cache_gb)
    if cache_gb is None:
        name, value = f"${CACHE_LIMIT}", os.environ.get(CACHE_LIMIT, "")
    if not value:
        return None
    try:
        limit = float(value)
    except ValueError:
        limit = 0.0
    if not 0 < limit < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return int(limit * 1e9)
