"""Exported files, opened: what they compute, of which inputs, and what they say of themselves."""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odconv.export.network import SIZES
from odconv.export.written import needed
from odconv.system.packages import without_warnings

NOTES = "odconv.json"
"""The file inside a program of torch.export that says what the network is."""
KEY = "odconv"
"""The entry of an AOTInductor package's metadata that does."""
NO_GPU = "torch.utils.cpp_extension"
"""What warns of a CUDA toolkit where there is no GPU, as AOTInductor is imported."""


class Opened(NamedTuple):
    """An exported file, ready to compute.

    Attributes:
        compute: from a batch in float32, and its sizes where the file takes them, to the outputs, each in float32 on
            the CPU.
        shape: of the images, with None for extents that may vary; None where the file does not say.
        outputs: names of the outputs; empty where the file does not say.
        notes: what the file says of the network: arch, classes, image_size, resize_size, mean, std.
        takes_sizes: whether it has a second input, the sizes; see :func:`odconv.export.network.told`.
    """

    compute: Callable[..., list[Tensor]]
    shape: tuple[int | None, ...] | None
    outputs: list[str]
    notes: dict[str, Any]
    takes_sizes: bool


def open_exported(path: Path, trust: bool = False) -> Opened:
    """Open an ONNX file, a program of torch.export or a package of AOTInductor.

    The first runs on the CPU, the others where they were made for. The name decides: what ends in .pt2 is PyTorch's,
    and everything else onnxruntime's, which computes and runs no code.

    Args:
        path: the file.
        trust: whether a .pt2 file may run code, as each can: a package is machine code, and PyTorch evaluates the sizes
            in a program as Python, and unpickles some of its members.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it has other inputs than images and sizes, or is a .pt2 file and not trusted.
        ImportError: onnxruntime is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix != ".pt2":
        return _open_onnx(path)
    if not trust:
        raise ValueError(
            f"{path} can run code when it is opened, as all .pt2 files can; if you trust its source, say "
            "trust=True, or --trust to a command. ONNX files need no trust"
        )
    if not zipfile.is_zipfile(path):
        raise OSError(f"{path} is no .pt2 file, or damaged or cut short")
    with zipfile.ZipFile(path) as archive:
        compiled = any("/aotinductor/" in name for name in archive.namelist())
    return _open_package(path) if compiled else _open_program(path)


def _open_onnx(path: Path) -> Opened:
    runtime = needed("onnxruntime")
    with _reading(path, "onnxruntime"):
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {given.name: given for given in session.get_inputs()}
    name, *sizes = _known(path, list(inputs))
    kind = inputs[name].type
    if kind not in ("tensor(float)", "tensor(float16)"):
        raise ValueError(f"the input {name} of {path} must be float32 or float16, got {kind}")
    dtype = torch.float16 if "16" in kind else torch.float32

    def compute(images: Tensor, *more: Tensor | None) -> list[Tensor]:
        given = {name: images.to(dtype).numpy()}
        given |= {name: tensor.numpy() for name, tensor in zip(sizes, more, strict=False) if tensor is not None}
        return [torch.from_numpy(output).float() for output in session.run(None, given)]

    shape = tuple(extent if isinstance(extent, int) else None for extent in inputs[name].shape)
    notes = {key: _parse(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    return Opened(compute, shape, [output.name for output in session.get_outputs()], notes, bool(sizes))


def _open_program(path: Path) -> Opened:
    extra = {NOTES: ""}
    with _reading(path, "PyTorch"):
        program = torch.export.load(path, extra_files=extra)
    name, *sizes = _known(path, [str(name) for name in program.graph_signature.user_inputs])
    (images,) = (node.meta["val"] for node in program.graph.nodes if node.name == name)
    shape = tuple(extent if isinstance(extent, int) else None for extent in images.shape)
    notes = _entries(extra[NOTES])
    return Opened(_calling(program.module(), images.device), shape, notes.pop("outputs", []), notes, bool(sizes))


def _open_package(path: Path) -> Opened:
    with _reading(path, "PyTorch"), without_warnings(NO_GPU):
        package = torch._inductor.aoti_load_package(str(path))
    metadata = package.get_metadata()
    notes = _entries(metadata.get(KEY, ""))
    shape = notes.pop("shape", None)
    compute = _calling(package, torch.device(metadata.get("AOTI_DEVICE_KEY", "cpu")))
    takes_sizes = bool(notes.pop("takes_sizes", False))
    return Opened(compute, shape and tuple(shape), notes.pop("outputs", []), notes, takes_sizes)


def _calling(network: Callable[..., Any], device: torch.device) -> Callable[..., list[Tensor]]:
    def compute(*inputs: Tensor | None) -> list[Tensor]:
        outputs = network(*(tensor.to(device) for tensor in inputs if tensor is not None))
        return [output.float().cpu() for output in (outputs if isinstance(outputs, Sequence) else [outputs])]

    return compute


def _parse(text: str) -> Any:
    """Return what a note says, which others write as plain text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _entries(text: str) -> dict[str, Any]:
    """Return what notes in one JSON object say; nothing where they are none."""
    notes = _parse(text)
    return notes if isinstance(notes, dict) else {}


def _known(path: Path, inputs: list[str]) -> list[str]:
    """Return the names of the inputs: that of the images, and "sizes" if the file takes them."""
    if not inputs or inputs[1:] not in ([], [SIZES]):
        raise ValueError(f"{path} must have one input, the images, but it has {', '.join(inputs) or 'none'}")
    return inputs


@contextmanager
def _reading(path: Path, engine: str) -> Iterator[None]:
    """Turn whatever an engine raises, which may be anything, into an OSError."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{engine} cannot read {path}: {' '.join(str(error).split())}") from error
