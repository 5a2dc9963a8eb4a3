"""Files from URLs: into the cache once, for any number of processes at a time."""

import hashlib
import http.client
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from odconv.system.files import cache_folder, replacing

SCHEMES = ("http", "https")
ATTEMPTS = 4
PAUSE = 1.0
"""Seconds before the second attempt; doubled before each further one."""
TIMEOUT = 30.0
"""Seconds without an answer, or without a byte."""
SLOWEST = 10_000
"""Bytes a second that must come in the whole, TIMEOUT aside."""
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
    """See that a URL is one that data may come from.

    Raises:
        ValueError: another scheme than http or https, no host, or more than a host and a path.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() not in SCHEMES or not parts.hostname:
        raise ValueError(f"data comes from a folder or from http://HOST/PATH or https://HOST/PATH, got {url!r}")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"a URL of data must be that of a folder, without user name, '?' and '#', got {url!r}")


def read_url(url: str) -> bytes:
    """Return what is at a URL, an index of shards.

    Raises:
        OSError: it cannot be had, or is too large to be one.
    """

    def attempt() -> bytes:
        content = bytearray()
        for chunk in _receive(url):
            content += chunk
            if len(content) > LARGEST_INDEX:
                raise DownloadError(f"it has more than the {LARGEST_INDEX:,} bytes that an index may have", final=True)
        return bytes(content)

    return _persist(url, attempt)


def open_url(
    url: str, size: int, sha256: str, *, cache: str | Path | None = None, limit: int | None = None
) -> BinaryIO:
    """Open a file from the cache, after downloading it unless that was done before.

    Args:
        url: where the file is.
        size: its size in bytes.
        sha256: its checksum, in hexadecimal digits.
        cache: see :func:`odconv.system.files.cache_folder`; the file lies in its folder "shards".
        limit: bytes that this folder may hold; the files opened least recently are removed first. Processes that
            download at the same moment may each exceed it by one file.

    Raises:
        OSError: the file cannot be had, is another one, or cannot be written.
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
        for chunk in _receive(url):
            digest.update(chunk)
            file.write(chunk)
            if file.tell() > size:
                break
        if file.tell() != size or digest.hexdigest() != sha256:
            raise DownloadError(f"it is not the file of {size} bytes that the index names")


def _receive(url: str) -> Iterator[bytes]:
    request = urllib.request.Request(url, headers={"User-Agent": "odconv"})
    began, received = time.monotonic(), 0
    try:
        with _opener().open(request, timeout=TIMEOUT) as response:
            while chunk := response.read1(1 << 20):  # what has come, where read would wait for all of it
                yield chunk
                received += len(chunk)
                if time.monotonic() - began > TIMEOUT + received / SLOWEST:
                    raise DownloadError(f"it comes at less than {SLOWEST:,} bytes a second")
            if response.length:
                raise DownloadError("the connection broke off")
    except urllib.error.HTTPError as error:
        final = error.code // 100 == 4 and error.code not in PASSING
        raise DownloadError(f"the server answers {error.code} {error.reason}", final) from error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(str(getattr(error, "reason", error)) or type(error).__name__) from error


class _Timed:
    """A connection of http.client of which neither the making nor the head of an answer takes longer than TIMEOUT."""

    sock: socket.socket | None

    @contextmanager
    def _limited(self) -> Iterator[None]:
        late = threading.Event()
        timer = threading.Timer(TIMEOUT, self._end, (late,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            if late.is_set():  # what came so far may look like a whole answer
                raise TimeoutError(f"no answer within {TIMEOUT:g} s")

    def _end(self, late: threading.Event) -> None:
        late.set()
        if self.sock is not None:
            with suppress(OSError):  # ended already
                self.sock.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        with self._limited():
            super().connect()  # type: ignore[misc]

    def getresponse(self) -> Any:
        with self._limited():
            return super().getresponse()  # type: ignore[misc]


class _Limited:
    """A handler of urllib whose connections are _Timed."""

    def do_open(self, http_class: type, req: urllib.request.Request, **arguments: Any) -> Any:
        return super().do_open(type("Connection", (_Timed, http_class), {}), req, **arguments)  # type: ignore[misc]


class _HTTPHandler(_Limited, urllib.request.HTTPHandler):  # type: ignore[misc]
    pass


class _HTTPSHandler(_Limited, urllib.request.HTTPSHandler):  # type: ignore[misc]
    pass


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener that, unlike urllib's own, is not led to ftp or a file by a redirection."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        _HTTPHandler,
        _HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


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
