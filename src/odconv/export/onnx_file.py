"""ONNX files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from odconv.export import graph
from odconv.export.network import AXES, INPUT, SIZES, Precision, Traced, refusal, trace, trials
from odconv.export.parity import TOLERANCES, verify
from odconv.export.quantisation import balanced, quantise
from odconv.export.written import Written, needed, writing
from odconv.layers import DynamicConv
from odconv.system.modules import check_module
from odconv.system.packages import without_warnings

Form = Literal["loop", "product"]
LIMIT = 2**31 - 2**20
"""Bytes that an ONNX file may have, which is one message of protobuf."""


def export_onnx(
    model: nn.Module,
    path: str | Path,
    input_size: Sequence[int],
    dynamic_batch: bool = True,
    *,
    dynamic_size: bool = False,
    sizes: bool = False,
    form: Form = "loop",
    opset: int = 18,
    precision: Precision = "float32",
    metadata: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Written:
    """Write a network as an ONNX file.

    Its input is called "images". Its output is "logits", or where the network returns several they have the keys of the
    dict, or "output_0" and so on. The model is not changed.

    Args:
        model: any network; the file computes what it does in evaluation mode.
        path: file to write; one that is there is replaced.
        input_size: shape of one input, such as (3, 224, 224).
        dynamic_batch: False for batches of one only, without a loop.
        dynamic_size: let height and width vary, as far as the network allows it.
        sizes: add a second input, "sizes", int64 (B, 2) for images: the height and width, from the upper left corner,
            that is not padding. The attentions pool over that part, see :func:`odconv.layers.pool_inside`.
        form: how a batch is computed by a dynamic network. "loop" takes one input after the other, which is fastest on
            CPUs; "product" takes all at once in matrix products, without the operator Scan.
        opset: version of ONNX's operators, at least 18 and at most the newest that the package onnx knows.
        precision: "float32" or "float16", of weights and activations; "int8", of the kernels of dynamic layers and of
            linear layers, what they are multiplied with being quantised when the network runs. Inputs and outputs stay
            float32.
        metadata: what the file shall say of the network, written as JSON: its classes, for example.
        check: compare the file with the network before it takes its place; see :func:`verify`.

    Returns:
        What was written.

    Raises:
        ValueError: an argument is out of range, a layer cannot be exported (the message names it), or the file does
            not compute what the network does. Nothing is written then.
        OSError: path cannot be written.
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    check_module(model)
    if form not in ("loop", "product"):
        raise ValueError(f"form must be 'loop' or 'product', got {form!r}")
    if precision not in ("float32", "float16", "int8"):
        raise ValueError(f"precision must be 'float32', 'float16' or 'int8' for ONNX, got {precision!r}")
    if opset < 18:
        raise ValueError(f"opset must be at least 18, got {opset}")
    for package in ("onnx", "onnxscript", *(["onnxruntime"] if check or precision == "int8" else [])):
        needed(package)
    if opset > (newest := needed("onnx").defs.onnx_opset_version()):
        raise ValueError(f"opset must be at most {newest}, the newest that the installed onnx knows, got {opset}")
    path = Path(path)
    with writing(path, ".onnx") as file:
        loop = dynamic_batch and form == "loop" and any(isinstance(part, DynamicConv) for part in model.modules())
        cpu = torch.device("cpu")
        source, kind = model, precision
        if precision == "int8":
            source, kind = balanced(model), "float32"
        traced = trace(source, cpu, input_size, dynamic_batch and not loop, dynamic_size, kind, sizes)
        inputs = [INPUT, SIZES] if sizes else [INPUT]
        network = translate(traced, inputs, opset, loop)
        graph.fold_batch_norm(network.graph)
        if precision == "int8":
            quantise(network)
        graph.tidy(network.graph, ["batch", "channels", *AXES[len(input_size) - 1]])
        if loop:
            network.graph.CopyFrom(graph.loop_over_batch(network.graph, inputs, traced.outputs))
        for key, value in (metadata or {}).items():
            network.metadata_props.add(key=key, value=json.dumps(value))
        if network.ByteSize() > LIMIT:
            raise ValueError("the network is larger than the 2 GB that an ONNX file can have")
        file.write_bytes(network.SerializeToString())
        shapes = trials(input_size, dynamic_batch, dynamic_size)
        error = verify(file, model, shapes, tolerance=TOLERANCES[precision]) if check else None
    return Written(path, path.stat().st_size / 1e6, traced.outputs, error)


def translate(traced: Traced, inputs: Sequence[str], opset: int, loop: bool) -> Any:
    """Return the traced network as a model of the package onnx, with its names or those inside of the loop.

    Raises:
        ValueError: ONNX has no operator for something in it; the message names the layer.
    """
    names = [graph.SAMPLE.format(name) if loop else name for name in (*inputs, *traced.outputs)]
    try:
        with without_warnings("onnxscript"):  # which names what it does not fold
            exported: Any = torch.onnx.export(
                traced.program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=names[: len(inputs)],
                output_names=names[len(inputs) :],
                custom_translation_table={torch.ops.aten.im2col.default: graph.unfold},
            )
    except torch.onnx.OnnxExporterError as error:
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        raise refusal(*blame(traced.program, str(error)), reason) from error
    return exported.model_proto


def blame(program: torch.export.ExportedProgram, message: str) -> tuple[str, str]:
    """Return the layer, by its name and class, of the operator that the exporter complains about."""
    for node in program.run_decompositions().graph.nodes:
        if f"%{node.name} :" in message and node.meta.get("nn_module_stack"):
            name, kind = list(node.meta["nn_module_stack"].values())[-1]
            return name.removeprefix("model").removeprefix("."), str(kind).split(".")[-1]
    return "", "network"
