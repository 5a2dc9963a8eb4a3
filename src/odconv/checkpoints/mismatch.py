"""Say what does not fit when weights are loaded, and guess why."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from odconv.checkpoints.keys import FACTORS, dynamic_layers, method_of, norm_of
from odconv.system.text import first_few


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


def explain(
    mismatch: Mismatch, state: Mapping[str, Tensor], own: Mapping[str, Tensor], model: str, path: str | Path
) -> str:
    """Say what of the file's tensors does not fit the model's, and the probable cause."""
    lines = [f"the checkpoint {path} does not fit the {model}"]
    if mismatch.missing:
        lines.append(f"{len(mismatch.missing)} keys missing in the file: {first_few(mismatch.missing)}")
    if mismatch.unexpected:
        lines.append(f"{len(mismatch.unexpected)} keys unknown to the model: {first_few(mismatch.unexpected)}")
    if mismatch.mismatched:
        shapes = [f"{key} {theirs} in the file, {ours} in the model" for key, theirs, ours in mismatch.mismatched]
        lines.append(f"{len(shapes)} of another shape: {first_few(shapes, '; ')}")
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


def _another_kind(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Say by the keys that a file is of another kind of network; empty where it is not."""
    theirs, ours = dynamic_layers(state), dynamic_layers(own)
    if bool(theirs) != bool(ours):
        file, network = ("dynamic", "static") if theirs else ("static", "dynamic")
        hint = "" if theirs else "; what begins with such a file is a warm start (warm_start)"
        return f"the file is of a {file} network, the model is {network}{hint}"
    if theirs and (file := method_of(state)) != (network := method_of(own)):
        return f"the file is of another method: {file}, the model is {network}"
    if theirs and (file := norm_of(state)) != (network := norm_of(own)):
        return (
            f"the attentions have {file} in the file, {network} in the model (norm: that of odl_ networks and of "
            'a warm start of cond_ is "layer")'
        )
    shared = len(own.keys() & state.keys())
    if shared < 0.75 * max(len(own), len(state)):
        return f"another architecture: of the model's {len(own)} keys, {shared} are among the file's {len(state)}"
    return ""


def _causes(mismatch: Mismatch, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Guess why weights do not fit, from the keys that are alike and from which axes of which tensors differ."""
    if kind := _another_kind(state, own):
        return [kind]
    ours = dynamic_layers(own)
    budgets = [
        f"another budget: {key} is {there} in the file, {here} in the model"
        for key, there, here in mismatch.mismatched
        if "warehouse_manager.weights." in key
    ]
    causes = {"budget": budgets[0]} if budgets else {}
    for key, there, here in mismatch.mismatched:
        layer, _, name = key.rpartition(".")
        if name != "weight" or len(there) != len(here):
            continue
        differ = [axis for axis, (a, b) in enumerate(zip(there, here, strict=True)) if a != b]
        if layer in ours:  # (n, O, C, ...)
            if 0 in differ:
                causes["kernel_num"] = f"kernel_num is {there[0]} in the file, {here[0]} in the model"
            differ = [axis - 1 for axis in differ if axis > 0]
        elif dynamic_layers([key]) & ours:
            if layer.endswith("attention.fc") and differ == [0]:
                causes["reduction"] = f"another reduction: {key} is {there} in the file, {here} in the model"
            continue
        if len(here) == 2 and differ == [0]:
            causes.setdefault(  # a detector's boxes come after its classes
                "num_classes",
                f"num_classes is {there[0]} in the file, {here[0]} in the model ({layer}); for other classes there is "
                "new_classifier, of detectors new_predictor",
            )
        elif {0, 1} & {*differ}:
            causes.setdefault("width", f"another width: {key} is {there} in the file, {here} in the model")
        elif differ:
            causes.setdefault("stem", f"another kernel size (stem?): {key} is {there} in the file, {here} in the model")
    return list(causes.values()) or ["other options of the layers or the network"]


def check_whole(model: nn.Module) -> None:
    """Raise a ValueError where layers of a model take their kernels from a warehouse that is no part of it."""
    parts = {*model.modules()}
    for name, part in model.named_modules():
        if (warehouse := getattr(part, "warehouse", None)) is not None and warehouse not in parts:
            raise ValueError(
                f"{name or 'the model'} is a {type(part).__name__} whose cells are in a warehouse that is no part of "
                f"the {type(model).__name__}: take the whole network, or put its warehouse into this one too"
            )
