"""Files for PyTorch: exported programs, and packages compiled by AOTInductor."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odconv.export.network import Precision, device_of, trace, trials
from odconv.export.opened import KEY, NO_GPU, NOTES
from odconv.export.parity import TOLERANCES, verify
from odconv.export.written import Written, writing
from odconv.system.modules import check_module
from odconv.system.packages import without_warnings


def export_torch(
    model: nn.Module,
    path: str | Path,
    input_size: Sequence[int],
    dynamic_batch: bool = True,
    *,
    dynamic_size: bool = False,
    sizes: bool = False,
    precision: Precision = "float32",
    compiled: bool = False,
    metadata: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Written:
    """Write a network as a program of torch.export, or compiled by AOTInductor.

    Read it with ``torch.export.load(path).module()``, a compiled one with ``torch._inductor.aoti_load_package(path)``;
    both take a batch in float32 and return a tuple. The model is not changed.

    Args:
        model: any network; the file computes what it does in evaluation mode.
        path: file to write, ending in ".pt2"; one that is there is replaced.
        input_size: shape of one input, such as (3, 224, 224).
        dynamic_batch: False for batches of one only.
        dynamic_size: let height and width vary, as far as the network allows it.
        sizes: add a second input, "sizes", int64 (B, 2) for images: the height and width, from the upper left corner,
            that is not padding. The attentions pool over that part, see :func:`odconv.layers.pool_inside`.
        precision: "float32", "float16" or "bfloat16", of weights and activations; inputs and outputs stay float32.
        compiled: compile with AOTInductor, for the machine that this runs on and the device that the model is on. It
            needs a C++ compiler.
        metadata: what the file shall say of the network: its classes, for example.
        check: compare the file with the network before it takes its place; see :func:`verify`.

    Returns:
        What was written.

    Raises:
        ValueError: an argument is out of range, a layer cannot be exported (the message names it), or the file does
            not compute what the network does. Nothing is written then.
        OSError: path cannot be written.
    """
    check_module(model)
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {path}")
    with writing(path, ".pt2") as file:
        traced = trace(model, device_of(model), input_size, dynamic_batch, dynamic_size, precision, sizes)
        notes = {**(metadata or {}), "outputs": traced.outputs}
        if compiled:
            extents = [None if dynamic_size else extent for extent in input_size[1:]]
            notes |= {"shape": [None if dynamic_batch else 1, input_size[0], *extents], "takes_sizes": sizes}
            configs = {"aot_inductor.metadata": {KEY: json.dumps(notes)}}
            with without_warnings(NO_GPU):
                torch._inductor.aoti_compile_and_package(
                    traced.program, package_path=str(file), inductor_configs=configs
                )
        else:
            torch.export.save(traced.program, file, extra_files={NOTES: json.dumps(notes)})
        shapes = trials(input_size, dynamic_batch, dynamic_size)
        error = verify(file, model, shapes, tolerance=TOLERANCES[precision], trust=True) if check else None
    return Written(path, path.stat().st_size / 1e6, traced.outputs, error)
