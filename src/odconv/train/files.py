"""Writing a run's files whole or not at all, and reading its checkpoints without running what is in them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; the file takes the place of `path` once it is whole and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoints, written through :func:`replacing` and read as weights only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        with replacing(Path(path)) as partial:
            torch.save(checkpoint, partial)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        return torch.load(path, map_location="cpu", weights_only=True)
