"""A run's checkpoints: written whole or not at all, and read without running what is in them."""

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from odconv.system.files import replacing

BEST, LAST, PREVIOUS = "best.ckpt", "last.ckpt", "previous.ckpt"


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoints, written through :func:`replacing` and read as weights only.

    What was LAST before stays as PREVIOUS, for disks that lose what was written to them.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        with replacing(Path(path)) as partial:
            try:
                torch.save(checkpoint, partial)
            except RuntimeError as error:  # of PyTorch's own writer, on a full disk for example
                there = partial.parent.is_dir()
                reason = f"the disk may be full ({error})" if there else f"the folder {partial.parent} is gone"
                raise OSError(reason) from error
            if (last := Path(path)).name == LAST and zipfile.is_zipfile(last):  # whole, as far as can be seen quickly
                _keep(last, last.with_name(PREVIOUS))

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        return torch.load(path, map_location="cpu", weights_only=True)


def _keep(file: Path, name: Path) -> None:
    with replacing(name) as partial:
        try:
            os.link(file, partial)
        except OSError:  # a file system without links
            shutil.copyfile(file, partial)
