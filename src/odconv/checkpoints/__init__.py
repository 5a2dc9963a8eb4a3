"""Checkpoints: found, read once, loaded with errors that explain, and written as safetensors."""

from odconv.checkpoints.finding import SUFFIXES, resolve
from odconv.checkpoints.loading import load_checkpoint
from odconv.checkpoints.mismatch import Mismatch
from odconv.checkpoints.reading import (
    Checkpoint,
    Weights,
    find_checkpoint,
    malformed,
    read_checkpoint,
    read_state_dict,
    size_limit,
)
from odconv.checkpoints.writing import save_safetensors

__all__ = [
    "SUFFIXES",
    "Checkpoint",
    "Mismatch",
    "Weights",
    "find_checkpoint",
    "load_checkpoint",
    "malformed",
    "read_checkpoint",
    "read_state_dict",
    "resolve",
    "save_safetensors",
    "size_limit",
]
