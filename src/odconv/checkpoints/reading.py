"""Read anybody's checkpoint once: the weights, and what is noted beside them.

No code in a file is ever run: everything is read with ``weights_only=True``. No file makes us ask for more memory than
some times its own size.
"""

import argparse
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odconv.checkpoints.finding import meant, released_file, resolve, similar_files
from odconv.checkpoints.keys import FACTORS, NOTED_TEMPERATURE, attention_of, bare_names, is_temperature
from odconv.system.files import is_exported
from odconv.system.text import first_few, printable

GAINS = "odconv.gains"
"""Where version 0.1.0 recorded the gains of the gates there, as JSON: name of the attention -> gain."""

EXPANSION = 8
"""How many times as large as its file what is in it may be, besides a MiB: tensors may share memory, and members of a
zip file be compressed."""

HARMLESS: list[Any] = [argparse.Namespace]
"""Classes besides PyTorch's that a file may hold: the options of a command, of which making one runs nothing. Many
training scripts note them, those of KernelWarehouse for example."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, read once and handed on to whoever needs a part of it.

    Attributes:
        path: the file.
        state: the tensors by name, without what wraps the names. Their memory may be that of the file: copy what you
            keep.
        temperature: what the file notes as the temperature of all attentions; None where it does not.
        content: all that the file holds; of safetensors its header.
    """

    path: Path
    state: dict[str, Tensor]
    temperature: float | None
    content: Mapping[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the training run that wrote the file; none where it was another program."""
        return dict(self._noted("hyper_parameters"))

    @property
    def notes(self) -> dict[str, Any]:
        """What the training run noted beside the weights, such as the classes; nothing where it was another program."""
        return dict(self._noted("odconv"))

    def _noted(self, entry: str) -> dict[str, Any]:
        found = self.content.get(entry) if "odconv" in self.content else {}
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} is malformed: its entry {entry} must be a dict, got {type(found).__name__}")
        return found


Weights = str | Path | Checkpoint
"""A file of weights: its path, a name on the Hugging Face Hub where it says so, or what was read of it."""


def read_checkpoint(weights: Weights) -> Checkpoint:
    """Read a checkpoint; what was read before is returned as it is.

    Reads safetensors, plain state dicts, and dicts that hold one under `state_dict`, `model` or `model_state_dict` (the
    published ODConv files, Lightning's, torchvision's). A prefix that wraps the keys, such as `module.`, is removed.

    Args:
        weights: the path of the file; or of a folder of `odconv release`, or its name (:func:`find_released`).

    Returns:
        The checkpoint; its tensors are on the CPU.

    Raises:
        FileNotFoundError: there is no such file; names similar ones.
        ValueError: the file is damaged, or no checkpoint, or holds no weights, or pickled objects that are no tensors
            (which are refused, not run), or tensors that are sparse, quantised, without content, or much larger than
            the file.
        OSError: the file cannot be read.
    """
    if isinstance(weights, Checkpoint):
        return weights
    path = released_file(weights)
    if not path.exists():
        raise FileNotFoundError(f"the checkpoint {path} does not exist{meant(path)}")
    if path.is_dir():
        raise IsADirectoryError(
            f"the checkpoint {path} is a folder, not a file{similar_files(path / path.resolve().name)}"
        )
    if is_exported(path):
        raise ValueError(f"{path} is an exported network, which odconv predict alone takes; give its checkpoint")
    path.open("rb").close()  # whatever fails from here on is the fault of the content
    with malformed(path):
        return _read(path)


def find_checkpoint(weights: Weights) -> Checkpoint:
    """Read a checkpoint, which may be named as on the Hugging Face Hub; see :func:`resolve`."""
    return weights if isinstance(weights, Checkpoint) else read_checkpoint(resolve(weights))


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights from a checkpoint, as tensors of their own; see :func:`read_checkpoint`."""
    return {key: tensor.detach().clone() for key, tensor in read_checkpoint(path).state.items()}


def size_limit(path: Path) -> int:
    """Return how many bytes what a file holds may take."""
    return EXPANSION * path.stat().st_size + 2**20


@contextmanager
def malformed(place: Any) -> Iterator[None]:
    """Turn what malformed content raises, wherever it is first used, into a ValueError that names the file."""
    try:
        yield
    except (LookupError, AttributeError, TypeError, ArithmeticError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{place} is malformed: {type(error).__name__}: {printable(error)}") from error


def _read(path: Path) -> Checkpoint:
    found, temperature, content = (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)
    _check_tensors(found, path)
    state = {bare: found[key] for key, bare in bare_names(found).items()}
    state |= _factors_beside(found, path)
    try:
        temperature = None if temperature is None else float(temperature)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} records a temperature that is no number: {temperature!r}") from error
    for key, tensor in state.items():
        if key.endswith(FACTORS) and not (tensor.shape == (2,) and (tensor > 0).all() and tensor.isfinite().all()):
            given = first_few(tensor.flatten().tolist())
            raise ValueError(f"{path} records factors that are no two positive numbers: {printable(key)} is {given}")
        if is_temperature(key, state) and not (tensor > 0).logical_and(tensor.isfinite()).all():
            given = first_few(tensor.flatten().tolist())
            raise ValueError(f"{path} records a temperature that is no positive number: {printable(key)} is {given}")
    return Checkpoint(path, state, temperature, content)


def _check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise a ValueError where a tensor is none that can be copied, or all together are too large to be in the file."""
    for key, tensor in state.items():
        plain = tensor.layout == torch.strided and not tensor.is_nested
        kind = "" if plain else str(tensor.layout).removeprefix("torch.").replace("_", " ")
        kind = kind or ("quantised" if tensor.is_quantized else "without content" if tensor.is_meta else "")
        if kind:
            raise ValueError(f"{path} holds a tensor that is {kind}, and cannot be loaded: {printable(key)}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > size_limit(path):
        raise ValueError(
            f"{path} holds tensors of {size:,} bytes, and {size_limit(path):,} are allowed for a file of its size"
        )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any, Mapping[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state: Any = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            header = file.metadata() or {}
            state._metadata = {name: {"gain": gain} for name, gain in json.loads(header.get(GAINS, "{}")).items()}
            return state, header.get(NOTED_TEMPERATURE), header
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged or cut short: {error}") from error
    except (json.JSONDecodeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} records gains that are no JSON object: {header[GAINS][:200]!r}") from error


def _factors_beside(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the factors that version 0.1.0 noted as gains beside the tensors, where PyTorch keeps versions."""
    notes, factors = getattr(state, "_metadata", None) or {}, {}
    for key, bare in bare_names(state).items():
        gain = notes.get(attention_of(key), {}).get("gain")
        if isinstance(gain, float | int):
            factors[f"{attention_of(bare)}.factors".removeprefix(".")] = torch.tensor((gain, 1.0), dtype=torch.float64)
        elif gain is not None:
            raise ValueError(f"{path} records gains that are no numbers: {gain!r}")
    return factors


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], Any, Mapping[str, Any]]:
    content = _unpickle(path)
    state = _find_state_dict(content, path)
    notes = content.get("odconv")
    return state, notes.get("temperature") if isinstance(notes, dict) else None, content


def _unpickle(path: Path) -> Any:
    """Return what torch.save wrote, on the CPU; of large tensors the place in the file, until they are used.

    Raises:
        ValueError: it is damaged, or no such file, or holds other objects than tensors and plain values, or is much
            larger when it is decompressed.
    """
    size, plain = 0, False
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            size = sum(member.file_size for member in members)
            plain = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if size <= size_limit(path):
            # mmap: what lies beside the weights, such as an optimizer's state, is never read from the disk
            with torch.serialization.safe_globals(HARMLESS):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=plain)
    except Exception as error:  # on damaged files torch.load raises about everything
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds an object that is no tensor ({refused[1]}) and could run code; it was refused, and "
                "nothing was run. If you trust the file, save its state dict alone, or allow the object with "
                "torch.serialization.add_safe_globals"
            ) from error
        raise ValueError(f"{path} is no PyTorch checkpoint, or damaged or cut short") from error
    raise ValueError(f"{path} holds {size:,} bytes, {size_limit(path):,} are allowed for a file of its size")


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    for entry in ("state_dict", "model", "model_state_dict"):
        if isinstance(content.get(entry), dict):
            content = content[entry]
            break
    else:
        if not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{path} holds no state dict, only the entries {first_few(content)}")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(content, "_metadata", {})
    if not state:
        raise ValueError(f"{path} holds a state dict without tensors")
    return state
