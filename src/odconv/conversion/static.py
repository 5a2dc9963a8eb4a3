"""Dynamic layers replaced by ordinary convolutions, for engines without dynamic weights, and what that costs."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odconv.conversion.convert import CONVOLUTIONS, replace_parts
from odconv.layers import Attentions, PerSampleConv
from odconv.layers.warehouse import Warehouse
from odconv.layers.warehouse_conv import KWConv
from odconv.ops.epilogue import MODULES, NO_EPILOGUE
from odconv.system.modules import check_module

KINDS = dict(zip(product((False, True), (1, 2, 3)), CONVOLUTIONS, strict=True))
"""PyTorch's convolutions, transposed or not, by their dimensions."""


class Score(NamedTuple):
    """What a network with static layers answers.

    Attributes:
        agreement: share of the inputs for which it chooses the class that the dynamic network does, in %.
        accuracy: share of them whose label it chooses, in %; None where the loader gives no labels.
    """

    agreement: float
    accuracy: float | None


class Frozen(NamedTuple):
    """A network without dynamic layers, and what was lost.

    Attributes:
        model: the network, in evaluation mode.
        inputs: how many inputs were measured with.
        before: the dynamic network; it agrees with itself.
        after: the static one.
        layers: the dynamic one with a single layer made static, by that layer's name, if it was asked for.
    """

    model: nn.Module
    inputs: int
    before: Score
    after: Score
    layers: dict[str, Score]

    def __str__(self) -> str:
        """Return the scores, in lines."""
        rows = {"dynamic": self.before, "static": self.after}
        rows |= {f"only {name} static": score for name, score in self.layers.items()}
        width = max(map(len, rows))
        lines = [f"on {self.inputs} inputs", f"{'':{width}}  agreement, %  accuracy, %"]
        for name, (agreement, accuracy) in rows.items():
            lines.append(f"{name:{width}}  {agreement:12.2f}  " + ("-" if accuracy is None else f"{accuracy:11.2f}"))
        return "\n".join(lines)


def to_static(model: nn.Module, loader: Iterable[Any], *, by_layer: bool = False) -> Frozen:
    """Replace dynamic layers by ordinary convolutions at their mean attentions, and measure what is lost.

    The network itself stays as it is. Its copy has `nn.Conv2d` and the like under the same names; what the attentions
    would have said of an input no longer counts.

    Args:
        model: a classifier with dynamic layers, from inputs to logits (B, classes). It runs in evaluation mode.
        loader: batches of inputs on the model's device, or of inputs and labels, several times over: a list of batches
            or a `DataLoader`. They should be like those that the network will meet; some hundreds are enough.
        by_layer: also measure the network with each of the layers alone made static, which takes a pass over the loader
            for each.

    Returns:
        The static network, and how often it agrees with the dynamic one and with the labels, before and after.

    Raises:
        ValueError: there are no dynamic layers, or no inputs; or a layer takes a context, or is never called.
        TypeError: `loader` is a tensor, or the network's output is no tensor of logits.
    """
    check_module(model)
    if isinstance(loader, Tensor):
        raise TypeError("loader must give batches, as a list of them or a DataLoader does, got one tensor")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PerSampleConv)}
    if not layers:
        raise ValueError(f"model must have dynamic layers, got a {type(model).__name__} without")
    for name, layer in layers.items():
        if getattr(layer, "context_channels", None) is not None:
            raise ValueError(f"{name} takes a context, which an ordinary convolution cannot")
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code would not call the hooks
        with _recording(model) as means:
            chosen, labels = _answers(model, loader)
        if silent := [name for name in layers if name not in means]:
            raise ValueError(f"{', '.join(silent)} took part in no answer, so its mean attentions are not known")
        static = copy.deepcopy(model)
        _replace(static, means)
        after = _score(static, loader, chosen, labels)
        alone = {}
        for name in means if by_layer else ():
            partly = copy.deepcopy(model)
            _replace(partly, {name: means[name]})
            alone[name] = _score(partly, loader, chosen, labels)
    accuracy = None if labels is None else _percent(chosen == labels)
    return Frozen(static, len(chosen), Score(100.0, accuracy), after, alone)


@contextmanager
def _recording(model: nn.Module) -> Iterator[dict[str, Attentions]]:
    """Give the mean attentions of each layer over all inputs, (1, ...), once the block is left."""
    sums: dict[str, list[Any]] = {}
    counts: dict[str, int] = {}
    means: dict[str, Attentions] = {}

    def record(name: str, attention: Any, found: Any) -> None:
        attentions = attention.named(found)
        totals = [None if a is None else a.sum(0, keepdim=True, dtype=torch.float64) for a in attentions]
        before = sums.get(name, [0.0] * len(totals))
        sums[name] = [None if total is None else total + old for total, old in zip(totals, before, strict=True)]
        counts[name] = counts.get(name, 0) + max((len(a) for a in attentions if a is not None), default=1)

    hooks = [
        module.attention.register_forward_hook(lambda attention, _, found, name=name: record(name, attention, found))
        for name, module in model.named_modules()
        if isinstance(module, PerSampleConv) and module.attention is not None
    ]
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()
    for name, totals in sums.items():
        means[name] = Attentions(*(None if total is None else total / counts[name] for total in totals))


def _answers(model: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    """Return the classes that a network chooses, and the labels if there are any."""
    chosen, labels = [], []
    for batch in loader:
        x, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
        logits = model(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise TypeError(f"model must return logits (B, classes), got {_describe(logits)}")
        chosen.append(logits.argmax(1).cpu())
        labels += [torch.as_tensor(rest[0]).cpu()] if rest else []
    if not chosen:
        raise ValueError("loader must have at least one batch, each time it is gone through, got none")
    return torch.cat(chosen), torch.cat(labels) if labels else None


def _score(model: nn.Module, loader: Iterable[Any], expected: Tensor, labels: Tensor | None) -> Score:
    chosen, _ = _answers(model, loader)
    if len(chosen) != len(expected):
        raise ValueError(f"loader must give the same inputs every time, got {len(expected)}, then {len(chosen)}")
    return Score(_percent(chosen == expected), None if labels is None else _percent(chosen == labels))


def _replace(model: nn.Module, means: Mapping[str, Attentions]) -> None:
    """Put convolutions in the place of layers, wherever they are."""
    layers = {name: model.get_submodule(name) for name in means}
    replace_parts(model, {layers[name]: _static_like(layers[name], mean) for name, mean in means.items()})
    used = {module.warehouse for module in model.modules() if isinstance(module, KWConv)}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, Warehouse) and child not in used:
                delattr(parent, name)


def _static_like(layer: Any, attentions: Attentions) -> nn.Module:
    """Return the convolution that a layer is at certain attentions, (1, ...)."""
    parts = layer.parts
    attentions = Attentions(*(None if a is None else a.to(parts.device) for a in attentions))
    bias = None if layer.bias is None else layer.bias.double()
    if (rows := getattr(layer, "kernel_bias", None)) is not None:
        mixed = rows[0] if attentions.kernel is None else attentions.kernel[0] @ rows.double()
        bias = mixed if bias is None else bias + mixed
    conv = convolution_like(layer, layer.kernels(attentions, torch.float64)[0], bias, parts)
    activation = getattr(layer, "epilogue", NO_EPILOGUE).activation  # of a fused network
    return conv if activation is None else nn.Sequential(conv, MODULES[activation]())


def convolution_like(layer: Any, kernel: Tensor, bias: Tensor | None, like: Tensor) -> nn.Module:
    """Return the static convolution of a layer's geometry with a kernel and a bias, placed and typed as `like`."""
    transposed = {"output_padding": layer.output_padding} if layer.transposed else {}
    conv: Any = KINDS[layer.transposed, layer.dims](
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=bias is not None,
        padding_mode=layer.padding_mode,
        device=like.device,
        dtype=like.dtype,
        **transposed,
    )
    conv.weight.copy_(kernel)
    if bias is not None:
        conv.bias.copy_(bias)
    return conv.eval()


def _percent(hits: Tensor) -> float:
    return 100.0 * hits.double().mean().item()


def _describe(output: Any) -> str:
    return f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
