"""Where files go, and writing them whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; the file takes the place of `path` once it is whole and on the disk.

    Raises:
        OSError: it cannot be written; what was at `path` stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


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
    """Return `cache`, or else $ODCONV_CACHE, or else ~/.cache/odconv."""
    return Path(cache or os.environ.get("ODCONV_CACHE") or "~/.cache/odconv").expanduser()
