"""Files from URLs: into the cache once, for any number of processes at a time."""

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from odconv.system.files import cache_folder, replacing
from odconv.system.packages import needed_by

WEB, STORES = ("http", "https"), {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}
"""Schemes of URLs, and the packages with which fsspec reads from a store."""
ATTEMPTS = 4
PAUSE = 1.0
"""Seconds before the second attempt; doubled before each further one."""
TIMEOUT = 30.0
"""Seconds without an answer, or without a byte."""
SLOWEST = 10_000
"""Bytes a second that must come in the whole, TIMEOUT aside."""
INDEX_TIME = 600.0
"""Seconds that an index may take in all."""
LARGEST_INDEX = 10**9
"""Bytes of an index, which has some 30 an image."""
PASSING = (408, 425, 429)
"""Client errors that may be over in a moment; the others stay."""

T = TypeVar("T")


class DownloadError(Exception):
    """A server did not give what was asked for; `final` if it will not the next time either."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def check_url(url: str) -> None:
    """See that a URL is one that data may come from; an ImportError names a package that its store needs."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if scheme not in (*WEB, *STORES) or not parts.netloc:
        raise ValueError(
            "data comes from a folder, from http://HOST/PATH or https://HOST/PATH, or from a store, s3://BUCKET/PATH, "
            f"gs://BUCKET/PATH or az://CONTAINER/PATH, got {url!r}"
        )
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"a URL of data must be that of a folder, without user name, '?' and '#', got {url!r}")
    if scheme in STORES:
        with needed_by(f"data at {scheme}://", STORES[scheme]):
            import_module(STORES[scheme])


def read_url(url: str) -> bytes:
    """Return what is at a URL, an index of shards; an OSError if it cannot be had, or is too large to be one."""

    def attempt() -> bytes:
        content = bytearray()
        for chunk in _receive(url, INDEX_TIME):
            content += chunk
            if len(content) > LARGEST_INDEX:
                raise DownloadError(f"it has more than the {LARGEST_INDEX:,} bytes that an index may have", final=True)
        return bytes(content)

    return _persist(url, attempt)


def open_url(
    url: str, size: int, sha256: str, *, cache: str | Path | None = None, limit: int | None = None
) -> BinaryIO:
    """Open a file of known size and checksum from the cache, after downloading it unless that was done before.

    It lies in the folder "shards" of the cache. The files opened least recently are removed first, for the folder to
    hold at most `limit` bytes; processes that download at the same moment may each exceed it by one file. It is an
    OSError if the file cannot be had, or is another one.
    """
    folder = cache_folder(cache) / "shards"
    key = hashlib.sha256(f"{url}\0{size}\0{sha256}".encode()).hexdigest()[:16]
    path = folder / f"{key}-{url.rpartition('/')[2]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_of(path)):  # the others wait instead of downloading too
        if not path.is_file() or path.stat().st_size != size:
            for left_over in folder.glob(f".{key}-*.partial"):  # by a process that was killed
                left_over.unlink(missing_ok=True)
            if limit is not None:
                with FileLock(folder / "room.lock"):
                    _make_room(folder, limit - size)
            _persist(url, lambda: _download(url, path, size, sha256))
        os.utime(path)
        return path.open("rb")


def _persist(url: str, attempt: Callable[[], T]) -> T:
    """Try until it works, or there is no hope."""
    tried = 1
    while True:
        try:
            return attempt()
        except DownloadError as error:
            if error.final or tried == ATTEMPTS:
                raise OSError(f"{url} cannot be had: {error} (attempt {tried} of {ATTEMPTS})") from error
        time.sleep(PAUSE * 2 ** (tried - 1))
        tried += 1


def _download(url: str, path: Path, size: int, sha256: str) -> None:
    digest = hashlib.sha256()
    with replacing(path) as partial, partial.open("wb") as file:
        for chunk in _receive(url, TIMEOUT + size / SLOWEST):
            digest.update(chunk)
            file.write(chunk)
            if file.tell() > size:
                break
        if file.tell() != size or digest.hexdigest() != sha256:
            raise DownloadError(f"it is not the file of {size} bytes that the index names")


def _receive(url: str, seconds: float) -> Iterator[bytes]:
    """Yield what is at a URL as it comes; it may take so many seconds in all."""
    import aiohttp

    began, received = time.monotonic(), 0
    try:
        with _stream(url, seconds) as stream:
            while chunk := stream.read(1 << 20):
                yield chunk
                received += len(chunk)
                if time.monotonic() - began > TIMEOUT + received / SLOWEST:
                    raise DownloadError(f"it comes at less than {SLOWEST:,} bytes a second")
    except FileNotFoundError as error:
        raise DownloadError("it is not there", final=True) from error
    except aiohttp.ClientResponseError as error:
        final = error.status // 100 == 4 and error.status not in PASSING
        raise DownloadError(f"the server answers {error.status} {error.message}", final) from error
    except (TimeoutError, asyncio.TimeoutError) as error:  # two classes in Python 3.10
        raise DownloadError(f"no answer within {TIMEOUT:g} s, or not all of it within {seconds:g} s") from error
    except (OSError, aiohttp.ClientError) as error:
        raise DownloadError(str(error) or type(error).__name__) from error


def _stream(url: str, seconds: float) -> Any:
    """Open a URL for reading from its beginning to its end."""
    import fsspec
    from aiohttp import ClientTimeout

    if urlsplit(url).scheme not in ("http", "https"):
        return fsspec.open(url, "rb").open()
    web = fsspec.filesystem("http", client_kwargs={"trust_env": True})  # as to proxies
    limits = ClientTimeout(total=seconds, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    return web.open(url, block_size=0, size=1, timeout=limits)  # some size, or else it asks for the size first


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _make_room(folder: Path, limit: int) -> None:
    """Remove the files opened least recently until those that stay have at most `limit` bytes."""
    files = [(path, path.stat()) for path in folder.iterdir() if path.suffix not in (".lock", ".partial")]
    total = sum(stat.st_size for _, stat in files)
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
        if total <= limit:
            break
        try:
            with FileLock(_lock_of(path), timeout=0):  # not one that is just being opened
                path.unlink()
        except (OSError, Timeout):
            continue
        total -= stat.st_size
