"""Writing an exported file: whole, and checked first."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from shutil import copyfile
from typing import Any, NamedTuple

from odconv.system.files import check_writable, replacing


class Written(NamedTuple):
    """A file that was written.

    Attributes:
        path: where it is.
        megabytes: its size.
        outputs: names of its outputs.
        error: greatest difference from PyTorch, as a share of the greatest output; None where it was not checked.
    """

    path: Path
    megabytes: float
    outputs: list[str]
    error: float | None


@contextmanager
def writing(path: Path, suffix: str) -> Iterator[Path]:
    """Give a file elsewhere to write to and check, which then takes the place of `path`.

    Raises:
        OSError: `path` cannot be written.
    """
    check_writable(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"path must be a file, got the folder {path}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"network{suffix}"
        yield file
        with replacing(path) as partial:
            copyfile(file, partial)


def needed(package: str) -> Any:
    """Import a package of the extra `export`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; ONNX files need more packages: pip install 'odconv[export]'") from error
