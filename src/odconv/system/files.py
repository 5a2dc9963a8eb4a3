"""Where files go, writing them whole or not at all, and reading none that has no end."""

import csv
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

EXPORTED = (".onnx", ".pt2")
"""How the names of exported networks end."""


def is_exported(path: str | Path) -> bool:
    """Return whether a path is named like an exported network and is no folder."""
    return Path(path).suffix in EXPORTED and not Path(path).is_dir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; the file takes the place of `path` once it is whole and on the disk.

    Raises:
        OSError: it cannot be written; what was at `path` stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of text, whole or not at all; an OSError as from :func:`replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a file of JSON; see :func:`write_text`."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of CSV with a head line; see :func:`write_text`."""
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process works on a file; where locks do not work, as on some network disks, several may.

    Raises:
        OSError: the file beside it that is locked cannot be written.
    """
    with path.with_suffix(".lock").open("w") as lock:
        with suppress(ImportError, OSError):
            import fcntl  # which Windows lacks

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_regular(path: str | Path, limit: int) -> BinaryIO:
    """Open a file to read it, and see that it is one, and not too large.

    At a named pipe a process may wait for ever, and a device or a sparse file may have no end.

    Args:
        path: the file; whoever catches an error names it.
        limit: bytes that it may have.

    Raises:
        OSError: it cannot be opened, is no regular file, or is larger.
    """
    # O_NONBLOCK: not waiting until somebody opens a pipe to write to it. SIM115: whoever called closes it
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return file
    file.close()
    if stat.S_ISREG(status.st_mode):
        raise OSError(f"it has {status.st_size:,} bytes, and {limit:,} are allowed")
    raise OSError("it is no regular file, but a pipe or a device")


def check_writable(folder: Path) -> None:
    """Make a folder, and see that files can be written to it.

    Raises:
        OSError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(f"the output folder {folder} cannot be written: {reason}") from error


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return `cache`, or else $ODCONV_CACHE, or else the system's folder for caches, such as ~/.cache/odconv."""
    return Path(cache or os.environ.get("ODCONV_CACHE") or platformdirs.user_cache_dir("odconv", False)).expanduser()
