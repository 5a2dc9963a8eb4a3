"""Checkpoints: found, read once, loaded with errors that explain, and written as safetensors."""

from odconv.checkpoints.finding import RELEASED, SUFFIXES, find_released, released_names, resolve, weights_folder
from odconv.checkpoints.loading import load_all_but, load_checkpoint
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
    "RELEASED",
    "SUFFIXES",
    "Checkpoint",
    "Mismatch",
    "Weights",
    "find_checkpoint",
    "find_released",
    "load_all_but",
    "load_checkpoint",
    "malformed",
    "read_checkpoint",
    "read_state_dict",
    "released_names",
    "resolve",
    "save_safetensors",
    "size_limit",
    "weights_folder",
]
