"""Work on ONNX graphs: unfolding, the loop over a batch, names of axes."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from odconv.export.written import needed

SAMPLE = "{}_of_one"
"""Name of an input or output inside of the loop."""
OPEN = 16
"""What the height or width of a map counts where it may vary."""


def unfold(
    x: Any, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Any:
    """``F.unfold`` as a depth-wise convolution whose kernels have a single one; gathering takes ten times as long."""
    import numpy as np

    op = needed("onnxscript").opset18
    channels, taps = x.shape[1], math.prod(kernel_size)
    ones = np.tile(np.eye(taps, dtype=x.dtype.numpy()).reshape(taps, 1, *kernel_size), (channels, 1, 1, 1))
    geometry = {"dilations": dilation, "group": channels, "pads": [*padding, *padding], "strides": stride}
    columns = op.Conv(x, op.Constant(value=needed("onnx").numpy_helper.from_array(ones)), **geometry)
    return op.Reshape(columns, op.Constant(value_ints=[0, channels * taps, -1]))


def fold_batch_norm(graph: Any) -> None:
    """Let convolutions whose kernel is computed do what the batch norm after them does, where the kernel is small.

    The exporter folds it into constant kernels only. A ReLU that follows at once is fused with the convolution.
    """
    import numpy as np

    onnx = needed("onnx")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    uses = Counter([name for node in graph.node for name in node.input] + [value.name for value in graph.output])
    shapes = {
        value.name: [axis.dim_value or OPEN for axis in value.type.tensor_type.shape.dim] for value in graph.value_info
    }
    nodes: list[Any] = []
    for norm in graph.node:
        conv: Any = makers.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        computed = conv is not None and conv.op_type == "Conv" and len(conv.input) == 2 and conv.input[1] in makers
        if not computed or uses[conv.output[0]] != 1 or not all(name in constants for name in norm.input[1:]):
            nodes.append(norm)
            continue
        if math.prod(shapes[conv.output[0]][2:]) < math.prod(shapes[conv.input[1]][1:]):
            nodes.append(norm)
            continue
        weight, bias, mean, variance = (onnx.numpy_helper.to_array(constants[name]) for name in norm.input[1:])
        options = {
            option.name: onnx.helper.get_attribute_value(option) for option in (*norm.attribute, *conv.attribute)
        }
        scale = weight / np.sqrt(variance.astype("float64") + options.get("epsilon", 1e-5))
        added = {
            f"{norm.output[0]}_scale": scale.reshape(-1, *[1] * (1 + len(options["strides"]))),
            f"{norm.output[0]}_shift": bias - mean * scale,
        }
        for name, value in added.items():
            graph.initializer.append(onnx.numpy_helper.from_array(value.astype(weight.dtype), name))
        scaled, (by, shift) = f"{norm.output[0]}_kernel", added
        nodes.insert(nodes.index(conv), onnx.helper.make_node("Mul", [conv.input[1], by], [scaled]))
        conv.input[:] = [conv.input[0], scaled, shift]
        conv.output[:] = norm.output
    used = {name for node in nodes for name in node.input}
    replace(graph.node, nodes)
    replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])


def replace(part: Any, items: Sequence[Any]) -> None:
    """Put other items, which may be some of the old ones, in the place of a repeated field's."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del part[:]
    part.extend(copies)


def tidy(graph: Any, names: Sequence[str]) -> None:
    """Leave out what the exporter notes of its own work, and call axes of the input that may vary by these names."""
    del graph.value_info[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    given = [axis.dim_param for axis in graph.input[0].type.tensor_type.shape.dim]
    called = {symbol: name for symbol, name in zip(given, names, strict=True) if symbol}
    for value in (*graph.input, *graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = re.sub(r"\w+", lambda found: called.get(found[0], found[0]), axis.dim_param)


def loop_over_batch(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    """Return a graph that runs the given one, of a batch of one, for each sample of a batch.

    The names of the given graph's inputs and outputs are those of :data:`SAMPLE`.
    """
    helper = needed("onnx").helper
    first, whole, count = "first_axis", [*inputs, *outputs], len(inputs)
    inside = [f"{SAMPLE.format(name)}_unbatched" for name in whole]
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}

    def value(name: str, sample: str, batch: Sequence[str]) -> Any:
        shape = [axis.dim_param or axis.dim_value for axis in types[sample].shape.dim]
        return helper.make_tensor_value_info(name, types[sample].elem_type, [*batch, *shape[1:]])

    samples = [SAMPLE.format(name) for name in whole]
    body = helper.make_graph(
        [
            *(
                helper.make_node("Unsqueeze", [row, first], [sample])
                for sample, row in zip(samples[:count], inside[:count], strict=True)
            ),
            *graph.node,
            *(
                helper.make_node("Squeeze", [sample, first], [row])
                for sample, row in zip(samples[count:], inside[count:], strict=True)
            ),
        ],
        "sample",
        [value(row, sample, []) for row, sample in zip(inside[:count], samples[:count], strict=True)],
        [value(row, sample, []) for row, sample in zip(inside[count:], samples[count:], strict=True)],
        # inside, where onnxruntime takes them for constants
        [*graph.initializer, helper.make_tensor(first, 7, [1], [0])],
    )
    loop = helper.make_node("Scan", whole[:count], whole[count:], body=body, num_scan_inputs=count)
    values = [value(name, sample, ["batch"]) for name, sample in zip(whole, samples, strict=True)]
    return helper.make_graph([loop], "batch", values[:count], values[count:])
