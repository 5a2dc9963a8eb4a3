"""Find what is meant: a path, the name of released weights, or a repository on the Hugging Face Hub."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from odconv.system.text import suggest

SUFFIXES = (".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors")
RELEASED = "model.safetensors"
"""The weights in a folder of `odconv release`."""

HUB_FILES = (RELEASED, "pytorch_model.bin", "model.pth", "model.pt")
PLACE = "ODCONV_WEIGHTS"
"""The environment variable that names the folder in which released weights are found by name."""


def weights_folder() -> Path:
    """Return the folder of what has a name: that of ODCONV_WEIGHTS, or `weights` in the current one."""
    return Path(os.environ.get(PLACE) or "weights")


def released_names() -> list[str]:
    """List the names of the released weights that are there."""
    return sorted(file.parent.name for file in weights_folder().glob(f"*/{RELEASED}"))


def find_released(weights: str | Path) -> Path:
    """Return the folder of released weights that is meant by a name, where nothing is at that path.

    Args:
        weights: the name, a single word; or a path, which is returned as it is, and so is a name that is not there.
    """
    if not isinstance(weights, str | os.PathLike):
        hint = "; load_state_dict takes tensors" if isinstance(weights, Mapping) else ""
        raise TypeError(f"weights must be a path or a name, got a {type(weights).__name__}{hint}")
    path = Path(weights)
    if path.exists() or len(path.parts) != 1:
        return path
    folder = weights_folder() / path
    return folder if (folder / RELEASED).is_file() else path


def released_file(weights: str | Path) -> Path:
    """Return the weights in a folder of `odconv release`, given by path or name; of other paths themselves."""
    path = find_released(weights)
    return file if (file := path / RELEASED).is_file() else path


def resolve(weights: str | Path) -> Path:
    """Find the file that is meant by a path, the name of released weights or that of a repository on the Hub.

    Args:
        weights: a path; or the name of released weights, see :func:`find_released`; or "owner/name", where nothing is
            at that path and the name has no suffix of a checkpoint, or "hf://owner/name" for the repository's
            model.safetensors, pytorch_model.bin, model.pth or model.pt; or "hf://owner/name/file". Files of the Hub are
            downloaded once and kept in its own cache, which also serves offline.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: neither a file nor a repository with weights was found.
        ValueError: a name that begins with hf:// and is none of the Hub's.
        ModuleNotFoundError: the Hub is meant, and huggingface_hub is not installed.
    """
    path, name = released_file(weights), str(weights)
    if name.startswith("hf://"):
        on_hub = re.fullmatch(r"hf://([^/]+/[^/]+)(?:/(.+))?", name)
        if not on_hub:
            raise ValueError(f"weights must be hf://owner/name or hf://owner/name/file, got {name}")
        repository, file = on_hub.groups()
        return _download(repository, [file] if file else HUB_FILES)
    if path.exists():
        return path
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not name.endswith(SUFFIXES):
        return _download(name, HUB_FILES)
    raise FileNotFoundError(f"the weights {path} do not exist{meant(path)}")


def meant(path: Path) -> str:
    """Say what may have been meant by a path at which nothing is: files beside it, or the name of released weights."""
    if len(path.parts) > 1 or path.suffix in SUFFIXES:
        return similar_files(path)
    names = released_names()
    there = f"{', '.join(names) or 'nothing'} in the folder {weights_folder()} (${PLACE} names another)"
    return f"; by name there is {there}{suggest(path.name, names) or similar_files(path)}"


def _download(repository: str, files: Sequence[str]) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"to get {repository} (which is no file) from the Hugging Face Hub, huggingface_hub is needed: "
            "pip install huggingface_hub"
        ) from error
    reason: Exception | None = None
    for file in files:
        try:
            return Path(hf_hub_download(repository, file))
        except EntryNotFoundError as error:  # not there, or offline and not in the cache
            reason = error
        except HfHubHTTPError as error:
            reason = error
            break
    raise FileNotFoundError(
        f"{repository} is no file, and the Hugging Face Hub gives no {' or '.join(files)} under that name: {reason}"
    ) from reason


def similar_files(path: Path) -> str:
    """Name the files beside `path` that may have been meant."""
    if not path.parent.is_dir():
        return f" (nor does its folder {path.parent})"
    names = [file.name for file in path.parent.iterdir() if file.is_file()]
    similar = difflib.get_close_matches(path.name, names, n=3) or sorted(n for n in names if n.endswith(SUFFIXES))[:3]
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in similar)}?" if similar else ""
