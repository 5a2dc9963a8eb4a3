"""Find the file that is meant: a path, or a repository on the Hugging Face Hub."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors")
HUB_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "model.pt")


def resolve(weights: str | Path) -> Path:
    """Find the file that is meant by a path or the name of a repository on the Hugging Face Hub.

    Args:
        weights: a path; or "owner/name", where nothing is at that path and the name has no suffix of a checkpoint, or
            "hf://owner/name" for the repository's model.safetensors, pytorch_model.bin, model.pth or model.pt; or
            "hf://owner/name/file". Files of the Hub are downloaded once and kept in its own cache, which also serves
            offline.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: neither a file nor a repository with weights was found.
        ValueError: a name that begins with hf:// and is none of the Hub's.
        ModuleNotFoundError: the Hub is meant, and huggingface_hub is not installed.
    """
    path, name = Path(weights), str(weights)
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
    raise FileNotFoundError(f"the weights {path} do not exist{similar_files(path)}")


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
