"""Weights in eight bits, by onnxruntime's quantiser."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from odconv.export.graph import replace
from odconv.export.written import needed
from odconv.layers import DynamicConv, PerSampleConv
from odconv.ops.contract import Attentions

FEW = 16
"""Rows of a matrix below which a scale for each column would take as much as the column saves."""


@torch.no_grad()
def balanced(model: nn.Module) -> nn.Module:
    """Return a copy in which all filters of a dynamic layer have one range, so that one scale suits them.

    What they were divided by is in the layer's filter attention: the copy computes what the network does. The cells of
    KernelWarehouse, which many filters share, stay as they are.

    Raises:
        ValueError: no layer mixes kernels.
    """
    copied = copy.deepcopy(model).float()
    layers = [layer for layer in copied.modules() if isinstance(layer, PerSampleConv) and len(layer.parts) > 1]
    if not layers:
        raise ValueError(
            "precision 'int8' is for dynamic layers that mix kernels, and the network has none; "
            "onnxruntime.quantization.quantize_static is for static networks"
        )
    for layer in layers:
        if not isinstance(layer, DynamicConv):
            continue
        blocks = layer.weight.flatten(3).unflatten(1, (layer.groups, -1))  # (n, g, O/g, C/g, k), transposed C/g, O/g
        largest = blocks.abs().amax((0, 2 if layer.transposed else 3, 4), keepdim=True)
        scale = torch.where(largest > 0, largest, 1)
        layer.weight.copy_((blocks / scale).reshape(layer.weight.shape))
        layer.attention = ScaledFilters(layer.attention, scale.flatten())  # type: ignore[assignment]
    return copied


class ScaledFilters(nn.Module):
    """An attention whose filter attention, which it may lack, is multiplied by a number for each filter."""

    scale: Tensor

    def __init__(self, attention: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Attentions:
        """Return the attentions of each sample in x, (B, C, *map)."""
        given = self.attention(x)
        scale = self.scale.expand(x.shape[0], -1)
        return given._replace(filter=scale if given.filter is None else given.filter * scale)


def quantise(network: Any) -> None:
    """Quantise the constant matrices of a model of the package onnx in place: the kernels to be mixed, linear layers.

    What is multiplied with them, such as an image's shares of the kernels, is quantised when the model runs. The bytes
    are unsigned: sums of signed ones overflow on processors without VNNI.
    """
    onnx, quantization = needed("onnx"), needed("onnxruntime.quantization")
    prepare = needed("onnxruntime.quantization.shape_inference").quant_pre_process
    options = {"op_types_to_quantize": ["MatMul"], "weight_type": quantization.QuantType.QUInt8}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "network.onnx")
        onnx.save(network, path)
        prepare(path, path, skip_symbolic_shape=True)
        prepared = onnx.load(path)
        rows = {tensor.name: tensor.dims[0] for tensor in prepared.graph.initializer if len(tensor.dims) == 2}
        mixing = [
            node.name for node in prepared.graph.node if node.op_type == "MatMul" and rows.get(node.input[1], FEW) < FEW
        ]
        quantization.quantize_dynamic(prepared, path, nodes_to_exclude=mixing, per_channel=True, **options)
        quantization.quantize_dynamic(path, path, **options)
        network.CopyFrom(onnx.load(path))
    replace(network.opset_import, [entry for entry in network.opset_import if not entry.domain])
    del network.metadata_props[:]
