"""A run's checkpoints: written whole or not at all, and read without running what is in them."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from odconv.files import replacing


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoints, written through :func:`replacing` and read as weights only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        with replacing(Path(path)) as partial:
            try:
                torch.save(checkpoint, partial)
            except RuntimeError as error:  # of PyTorch's own writer, on a full disk for example
                raise OSError(f"the disk may be full ({error})") from error

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        return torch.load(path, map_location="cpu", weights_only=True)
