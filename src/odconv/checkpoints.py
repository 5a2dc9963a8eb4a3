"""Reading weights from anybody's checkpoints, loading them with errors that explain, and writing safetensors.

No code in a file is ever run: everything is read with ``weights_only=True``. No file makes us ask for more memory than
some times its own size.
"""

import difflib
import json
import logging
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odconv.files import check_writable, replacing
from odconv.words import printable

WRAPPERS = ("module.", "model.")
"""What DataParallel and LightningModules put before every key."""

SUFFIXES = (".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors")
HUB_FILES = ("model.safetensors", "pytorch_model.bin", "model.pth", "model.pt")
TEMPERATURE = "attention.temperature"
"""What the keys end with that hold an attention's temperature; published files have none."""

NOTED_TEMPERATURE = "odconv.temperature"
"""Where a safetensors file's header records the temperature, for files without those keys."""

GAINS = "odconv.gains"
"""Where version 0.1.0 recorded the gains of the gates there, as JSON: name of the attention -> gain."""

FACTORS = "attention.factors"
"""What the keys end with that hold an attention's factors, where they are not the published ones."""

EXPANSION = 8
"""How many times as large as its file what is in it may be, besides a MiB: tensors may share memory, and members of a
zip file be compressed."""

logger = logging.getLogger(__name__)


class Content(NamedTuple):
    """What a checkpoint holds for a network.

    Attributes:
        state: the tensors by name, without what wraps the names.
        temperature: what the file notes as the temperature of all attentions; None where it does not.
    """

    state: dict[str, Tensor]
    temperature: float | None


class Mismatch(NamedTuple):
    """What did not fit when weights were loaded.

    Attributes:
        missing: keys of the model that the file does not have.
        unexpected: keys of the file that the model does not have.
        mismatched: keys whose tensors have another shape: (key, shape in the file, shape in the model).
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights from a checkpoint.

    Reads safetensors, plain state dicts, and dicts that hold one under `state_dict`, `model` or `model_state_dict` (the
    published ODConv files, Lightning's, torchvision's). A prefix that wraps the keys, such as `module.`, is removed.

    Args:
        path: the file.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file; names similar ones.
        ValueError: the file is damaged, or no checkpoint, or holds no weights, or pickled objects that are no tensors
            (which are refused, not run), or tensors that are sparse, quantised, without content, or much larger than
            the file.
        OSError: the file cannot be read.
    """
    return _read(Path(path)).state


def load_checkpoint(model: nn.Module, path: str | Path, strict: bool = True) -> Mismatch:
    """Load the weights of a checkpoint into a model.

    Tensors are converted to the model's device and dtype. Keys are compared without the prefixes that wrap them, on
    both sides. `num_batches_tracked` may be missing, as PyTorch allows too.

    Where the file records the temperature at which its dynamic layers were trained, as a tensor of each attention or
    one for all beside the tensors, it is set in the model's; published files do not, and the model keeps its own.
    Factors of gates and shares that a file holds (those of a network with a warm start) are taken over, and a warning
    says so where the model had others. A file without them is a published one: it does not fit a model that has some.

    Args:
        model: the network.
        path: the file; see :func:`read_state_dict` for what it can be.
        strict: True to load all or nothing. False to load what fits and leave the rest of the model as it is.

    Returns:
        What did not fit; nothing if `strict`.

    Raises:
        FileNotFoundError, ValueError, OSError: as :func:`read_state_dict`.
        ValueError: `strict`, and something does not fit. The message lists it and guesses the cause; the model is left
            untouched.
        ValueError: the model is on the meta device, or the temperature or a factor in the file is no positive number,
            or complex numbers would go into a real tensor; the model is left untouched.
    """
    state, temperature = _read(Path(path))
    own_keys = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    names = {bare: key for key, bare in _bare_names(own_keys).items()}
    own = {bare: own_keys[key] for bare, key in names.items()}
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            f"the {type(model).__name__} is on the meta device, where nothing can be loaded; call "
            "model.to_empty(device=...) first"
        )
    tempered = _with_temperature(model)
    state = {key: t.reshape(()) if names.get(key) in tempered and t.numel() == 1 else t for key, t in state.items()}
    fits = {key: names[key] for key, tensor in state.items() if key in own and own[key].shape == tensor.shape}
    attentions = {_attention(key): _attention(name) for key, name in names.items()}
    new = {key: attentions[_attention(key)] for key in state if key.endswith(FACTORS) and _attention(key) in attentions}
    fits |= {key: f"{attention}.factors" if attention else "factors" for key, attention in new.items()}
    mismatch = Mismatch(
        missing=[
            key
            for key in own
            if key not in state and not (key.endswith("num_batches_tracked") or names[key] in tempered)
        ],
        unexpected=[key for key in state if key not in own and key not in new],
        mismatched=[
            (key, tuple(tensor.shape), tuple(own[key].shape))
            for key, tensor in state.items()
            if key in own and own[key].shape != tensor.shape
        ],
    )
    if strict and any(mismatch):
        raise ValueError(_explain(mismatch, state, own, type(model).__name__, path))
    if complex_ones := [key for key in fits if state[key].is_complex() and not (key in own and own[key].is_complex())]:
        raise ValueError(f"{path} holds complex numbers, and the model real ones: {_some(complex_ones)}")
    if temperature is not None:
        for attention in tempered.values():
            attention.set_temperature(temperature)
    before = _factors(model)
    model.load_state_dict(OrderedDict((own_name, state[key]) for key, own_name in fits.items()), strict=False)
    after = _factors(model)
    if changed := [f"{name}: {after[name]}, were {before[name]}" for name in after if after[name] != before[name]]:
        logger.warning("factors of gates and shares were taken from %s: %s", path, _some(changed, "; "))
    return mismatch


def save_safetensors(
    weights: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    published: bool = False,
) -> None:
    """Write weights as a safetensors file, whole or not at all.

    Tensors that share memory are written once for each of their names.

    Args:
        weights: a model, or its state dict.
        path: the file; its folder is made where needed, an old file is replaced.
        metadata: texts to keep in the file's header.
        published: write the keys of published checkpoints alone. The temperature, which these lack, goes into the
            header, where :func:`load_checkpoint` finds it.

    Raises:
        OSError: the file cannot be written.
        ValueError: `published`, and the layers have different temperatures, or factors of gates and shares, which no
            published file has.
    """
    from safetensors.torch import save

    path = Path(path)
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    record: dict[str, str] = {}
    if published:
        if factors := [key for key in state if key.endswith(FACTORS)]:
            raise ValueError(f"published must be False for layers with a gain or kernel_gain, got {_some(factors)}")
        temperatures = {key: value for key, value in state.items() if _is_temperature(key, state)}
        values = {float(value) for value in temperatures.values()}
        if len(values) > 1:
            raise ValueError(f"published must be False for different temperatures: {_some(map(str, sorted(values)))}")
        record = {NOTED_TEMPERATURE: str(values.pop())} if values else {}
        state = {key: value for key, value in state.items() if key not in temperatures}
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in state.items()
        if isinstance(tensor, Tensor)
    }
    content = save(tensors, {"format": "pt", **record, **(metadata or {})})
    check_writable(path.parent)
    with replacing(path) as partial:
        partial.write_bytes(content)


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
    raise FileNotFoundError(f"the weights {path} do not exist{_similar_files(path)}")


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


def room(path: Path) -> int:
    """How many bytes what a file holds may take."""
    return EXPANSION * path.stat().st_size + 2**20


@contextmanager
def malformed(place: Any) -> Iterator[None]:
    """Turn what malformed content raises, wherever it is first used, into a ValueError that names the file."""
    try:
        yield
    except (LookupError, AttributeError, TypeError, ArithmeticError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{place} is malformed: {type(error).__name__}: {printable(error)}") from error


def _read(path: Path) -> Content:
    if not path.exists():
        raise FileNotFoundError(f"the checkpoint {path} does not exist{_similar_files(path)}")
    if path.is_dir():
        raise IsADirectoryError(f"the checkpoint {path} is a folder, not a file{_similar_files(path / path.name)}")
    path.open("rb").close()  # whatever fails from here on is the fault of the content
    with malformed(path):
        return _content(path)


def _content(path: Path) -> Content:
    found, temperature = (_read_safetensors if path.suffix == ".safetensors" else _read_pickle)(path)
    _check_tensors(found, path)
    state = {bare: found[key] for key, bare in _bare_names(found).items()}
    state |= _factors_beside(found, path)
    try:
        temperature = None if temperature is None else float(temperature)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} records a temperature that is no number: {temperature!r}") from error
    for key, tensor in state.items():
        if key.endswith(FACTORS) and not (tensor.shape == (2,) and (tensor > 0).all() and tensor.isfinite().all()):
            given = _some(map(str, tensor.flatten().tolist()))
            raise ValueError(f"{path} records factors that are no two positive numbers: {printable(key)} is {given}")
        if _is_temperature(key, state) and not (tensor > 0).logical_and(tensor.isfinite()).all():
            given = _some(map(str, tensor.flatten().tolist()))
            raise ValueError(f"{path} records a temperature that is no positive number: {printable(key)} is {given}")
    # copies, for memory that is mapped from a file changes with the file
    return Content({key: tensor.detach().clone() for key, tensor in state.items()}, temperature)


def _check_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise a ValueError where a tensor is none that can be copied, or all together are too large to be in the file."""
    for key, tensor in state.items():
        plain = tensor.layout == torch.strided and not tensor.is_nested
        kind = "" if plain else str(tensor.layout).removeprefix("torch.").replace("_", " ")
        kind = kind or ("quantised" if tensor.is_quantized else "without content" if tensor.is_meta else "")
        if kind:
            raise ValueError(f"{path} holds a tensor that is {kind}, and cannot be loaded: {printable(key)}")
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > room(path):
        raise ValueError(
            f"{path} holds tensors of {size:,} bytes, and {room(path):,} are allowed for a file of its size"
        )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state: Any = OrderedDict((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            header = file.metadata() or {}
            state._metadata = {name: {"gain": gain} for name, gain in json.loads(header.get(GAINS, "{}")).items()}
            return state, header.get(NOTED_TEMPERATURE)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged or cut short: {error}") from error
    except (json.JSONDecodeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} records gains that are no JSON object: {header[GAINS][:200]!r}") from error


def _factors_beside(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the factors that version 0.1.0 noted as gains beside the tensors, where PyTorch keeps versions."""
    notes, factors = getattr(state, "_metadata", None) or {}, {}
    for key, bare in _bare_names(state).items():
        gain = notes.get(_attention(key), {}).get("gain")
        if isinstance(gain, float | int):
            factors[f"{_attention(bare)}.factors".removeprefix(".")] = torch.tensor((gain, 1.0), dtype=torch.float64)
        elif gain is not None:
            raise ValueError(f"{path} records gains that are no numbers: {gain!r}")
    return factors


def _factors(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the factors of gates and shares by the attentions' names."""
    attentions = ((name, module) for name, module in model.named_modules() if hasattr(module, "set_factors"))
    return {name: (attention.gain, attention.kernel_gain) for name, attention in attentions}


def _with_temperature(model: nn.Module) -> dict[str, Any]:
    """Return the attentions that have a temperature, by the names of these buffers."""
    return {
        f"{name}.temperature".removeprefix("."): module
        for name, module in model.named_modules(remove_duplicate=False)
        if getattr(module, "initial_temperature", None) is not None
    }


def _is_temperature(key: str, state: Mapping[str, Tensor]) -> bool:
    """Tell an attention's temperature from other tensors of that name: a number, beside heads."""
    if not key.endswith(TEMPERATURE) or state[key].numel() != 1:
        return False
    place = key.removesuffix("temperature")
    return any(f"{place}{name}_fc.weight" in state for name in ("kernel", "channel", "filter", "spatial"))


def _attention(key: str) -> str:
    """Return the attention's name in the key of a tensor: "conv1.attention" of "conv1.attention.fc.weight"."""
    return key.rsplit(".", 1 if key.endswith(FACTORS) else 2)[0]


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], Any]:
    content = unpickle(path)
    state = _find_state_dict(content, path)
    notes = content.get("odconv")
    return state, notes.get("temperature") if isinstance(notes, dict) else None


def unpickle(path: Path) -> Any:
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
        if size <= room(path):
            # mmap: what lies beside the weights, such as an optimizer's state, is never read from the disk
            return torch.load(path, map_location="cpu", weights_only=True, mmap=plain)
    except Exception as error:  # on damaged files torch.load raises about everything
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds an object that is no tensor ({refused[1]}) and could run code; it was refused, and "
                "nothing was run. If you trust the file, save its state dict alone, or allow the object with "
                "torch.serialization.add_safe_globals"
            ) from error
        raise ValueError(f"{path} is no PyTorch checkpoint, or damaged or cut short") from error
    raise ValueError(f"{path} holds {size:,} bytes, {room(path):,} are allowed for a file of its size")


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    for entry in ("state_dict", "model", "model_state_dict"):
        if isinstance(content.get(entry), dict):
            content = content[entry]
            break
    else:
        if not all(isinstance(value, Tensor) for value in content.values()):
            raise ValueError(f"{path} holds no state dict, only the entries {_some(map(str, content))}")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(content, "_metadata", {})
    if not state:
        raise ValueError(f"{path} holds a state dict without tensors")
    return state


def _bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Map each key to itself without what wraps nearly all (nine of ten) of them, and without torch.compile's mark."""
    bare = {key: key.replace("_orig_mod.", "") for key in keys}
    while wrapper := next((w for w in WRAPPERS if sum(b.startswith(w) for b in bare.values()) > 0.9 * len(bare)), None):
        shorter = {key: name.removeprefix(wrapper) for key, name in bare.items()}
        if len(set(shorter.values())) < len(bare):
            break
        bare = shorter
    return bare


def _explain(
    mismatch: Mismatch, state: Mapping[str, Tensor], own: Mapping[str, Tensor], model: str, path: str | Path
) -> str:
    lines = [f"the checkpoint {path} does not fit the {model}"]
    if mismatch.missing:
        lines.append(f"{len(mismatch.missing)} keys missing in the file: {_some(mismatch.missing)}")
    if mismatch.unexpected:
        lines.append(f"{len(mismatch.unexpected)} keys unknown to the model: {_some(mismatch.unexpected)}")
    if mismatch.mismatched:
        shapes = [f"{key} {theirs} in the file, {ours} in the model" for key, theirs, ours in mismatch.mismatched]
        lines.append(f"{len(shapes)} of another shape: {_some(shapes, '; ')}")
    without = [key for key in mismatch.missing if key.endswith(FACTORS)]
    if without and len(without) == sum(len(part) for part in mismatch):
        gain, kernel_gain = own[without[0]].tolist()
        lines.append(
            "probable cause: a file without factors is one whose gates and shares have factor 1, as published; the "
            f"model's layers were made with gain={gain:.4g} and kernel_gain={kernel_gain:.4g}, as by a warm start"
        )
    else:
        lines += [f"probable cause: {cause}" for cause in _causes(mismatch, state, own)]
    return "\n  ".join(lines)


def _causes(mismatch: Mismatch, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Guess why weights do not fit, from the keys that are alike and from which axes of which tensors differ."""
    theirs, ours = _dynamic_layers(state), _dynamic_layers(own)
    if bool(theirs) != bool(ours):
        file, network = ("dynamic", "static") if theirs else ("static", "dynamic")
        return [f"the file is of a {file} network, the model is {network}"]
    if theirs and (file := _method(state)) != (network := _method(own)):
        return [f"the file is of another method: {file}, the model is {network}"]
    shared = len(own.keys() & state.keys())
    if shared < 0.75 * max(len(own), len(state)):
        return [f"another architecture: of the model's {len(own)} keys, {shared} are among the file's {len(state)}"]
    causes: dict[str, str] = {}
    for key, there, here in mismatch.mismatched:
        layer, _, name = key.rpartition(".")
        if name != "weight" or len(there) != len(here):
            continue
        differ = [axis for axis, (a, b) in enumerate(zip(there, here, strict=True)) if a != b]
        if layer in ours:  # (n, O, C, ...)
            if 0 in differ:
                causes["kernel_num"] = f"kernel_num is {there[0]} in the file, {here[0]} in the model"
            differ = [axis - 1 for axis in differ if axis > 0]
        elif _dynamic_layers([key]) & ours:
            if layer.endswith("attention.fc") and differ == [0]:
                causes["reduction"] = f"another reduction: {key} is {there} in the file, {here} in the model"
            continue
        if len(here) == 2 and differ == [0]:
            causes["num_classes"] = f"num_classes is {there[0]} in the file, {here[0]} in the model ({layer})"
        elif {0, 1} & {*differ}:
            causes.setdefault("width", f"another width: {key} is {there} in the file, {here} in the model")
        elif differ:
            causes.setdefault("stem", f"another kernel size (stem?): {key} is {there} in the file, {here} in the model")
    return list(causes.values()) or ["other options of the layers or the network"]


def _dynamic_layers(keys: Iterable[str]) -> set[str]:
    """Return the names of the layers with an attention of their own; a lone layer has the name ""."""
    return {f".{key}".rpartition(".attention.")[0][1:] for key in keys if ".attention." in f".{key}"}


def _method(keys: Iterable[str]) -> str:
    """Tell the method of dynamic layers from the parts of their attentions."""
    parts = {f".{key}".partition(".attention.")[2].partition(".")[0] for key in keys}
    return "ODConv" if "channel_fc" in parts else "DyConv" if "fc" in parts else "CondConv"


def _similar_files(path: Path) -> str:
    """Name the files beside `path` that may have been meant."""
    if not path.parent.is_dir():
        return f" (nor does its folder {path.parent})"
    names = [file.name for file in path.parent.iterdir() if file.is_file()]
    similar = difflib.get_close_matches(path.name, names, n=3) or sorted(n for n in names if n.endswith(SUFFIXES))[:3]
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in similar)}?" if similar else ""


def _some(names: Iterable[str], separator: str = ", ") -> str:
    """List at most eight names."""
    names = list(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (printable(separator.join(names[:8])) or "none") + more
