"""Load weights into a model, all or nothing."""

import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from odconv.checkpoints.keys import ASSIGNMENT, BLEND, FACTORS, OPTIONAL, attention_of, bare_names
from odconv.checkpoints.mismatch import Mismatch, check_whole, explain
from odconv.checkpoints.reading import Checkpoint, Weights, read_checkpoint
from odconv.system.modules import check_module
from odconv.system.text import first_few

logger = logging.getLogger(__name__)


def load_checkpoint(model: nn.Module, path: Weights, strict: bool = True) -> Mismatch:
    """Load the weights of a checkpoint into a model.

    Tensors are converted to the model's device and dtype. Keys are compared without the prefixes that wrap them, on
    both sides. `num_batches_tracked` may be missing, as PyTorch allows too.

    Where the file records the temperature at which its dynamic layers were trained, as a tensor of each attention or
    one for all beside the tensors, it is set in the model's; published files do not, and the model keeps its own.
    Factors of gates and shares that a file holds (those of a network with a warm start) are taken over like it, and the
    log says so (level INFO) where the model had others. A file without them is a published one: it does not fit a model
    that has some.

    Args:
        model: the network.
        path: the file, or what :func:`odconv.checkpoints.read_checkpoint` read of it; see there for what it can be.
        strict: True to load all or nothing. False to load what fits and leave the rest of the model as it is.

    Returns:
        What did not fit; nothing if `strict`.

    Raises:
        FileNotFoundError, ValueError, OSError: as :func:`odconv.checkpoints.read_checkpoint`.
        ValueError: `strict`, and something does not fit. The message lists it and guesses the cause; the model is left
            untouched.
        ValueError: the model is on the meta device, or the temperature or a factor in the file is no positive number,
            or complex numbers would go into a real tensor; the model is left untouched.
    """
    check_module(model)
    checkpoint = read_checkpoint(path)
    path, state, temperature = checkpoint.path, checkpoint.state, checkpoint.temperature
    own_keys = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    names = {bare: key for key, bare in bare_names(own_keys).items()}
    own = {bare: own_keys[key] for bare, key in names.items()}
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            f"the {type(model).__name__} is on the meta device, where nothing can be loaded; call "
            "model.to_empty(device=...) first"
        )
    tempered = _with_temperature(model)
    state = {key: t.reshape(()) if names.get(key) in tempered and t.numel() == 1 else t for key, t in state.items()}
    fits = {key: names[key] for key, tensor in state.items() if key in own and own[key].shape == tensor.shape}
    attentions = {attention_of(key): attention_of(name) for key, name in names.items()}
    new = {
        key: attentions[attention_of(key)] for key in state if key.endswith(FACTORS) and attention_of(key) in attentions
    }
    fits |= {key: f"{attention}.factors" if attention else "factors" for key, attention in new.items()}
    mismatch = Mismatch(
        missing=[key for key in own if key not in state and not (key.endswith(OPTIONAL) or names[key] in tempered)],
        unexpected=[key for key in state if key not in own and key not in new],
        mismatched=[
            (key, tuple(tensor.shape), tuple(own[key].shape))
            for key, tensor in state.items()
            if key in own and own[key].shape != tensor.shape
        ],
    )
    if strict and any(mismatch):
        raise ValueError(explain(mismatch, state, own, type(model).__name__, path))
    if complex_ones := [key for key in fits if state[key].is_complex() and not (key in own and own[key].is_complex())]:
        raise ValueError(f"{path} holds complex numbers, and the model real ones: {first_few(complex_ones)}")
    check_whole(model)
    check_warehouse(model, state, {key: own[key] for key in fits if key in own}, path)
    if temperature is not None:
        for attention in tempered.values():
            attention.set_temperature(temperature)
    before = _factors(model)
    model.load_state_dict(OrderedDict((own_name, state[key]) for key, own_name in fits.items()), strict=False)
    after = _factors(model)
    if changed := [f"{name}: {after[name]}, were {before[name]}" for name in after if after[name] != before[name]]:
        logger.info("factors of gates and shares were taken from %s: %s", path, first_few(changed, "; "))
    return mismatch


def load_all_but(model: nn.Module, checkpoint: Checkpoint, left_out: re.Pattern[str]) -> None:
    """Load the weights of a model for other classes, but those of its last layers.

    Args:
        model: the network, whose tensors of these names stay as they are.
        checkpoint: what was read of the file; it may have such tensors, of any shape, or none.
        left_out: how the names begin. All others must fit.

    Raises:
        ValueError: as :func:`load_checkpoint`.
    """
    kept = {key: tensor for key, tensor in model.state_dict().items() if left_out.match(key)}
    state = {key: tensor for key, tensor in checkpoint.state.items() if not left_out.match(key)}
    load_checkpoint(model, replace(checkpoint, state=state | kept))


def check_warehouse(model: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Raise a ValueError where kernels lie elsewhere in a file's warehouse than in the model's.

    Args:
        model: the network.
        state: the file's tensors.
        own: the model's, under the same keys, where they have the same shape.
        path: the file.
    """
    for key, tensor in own.items():
        if key.endswith(ASSIGNMENT) and not state[key].equal(tensor.to(state[key])):
            raise ValueError(
                f"the checkpoint {path} does not fit the {type(model).__name__}: {key.removesuffix('.assignment')} "
                "takes its kernel from other cells there. The warehouse of that network was filled in another order, "
                "which makes another network with the same keys and shapes"
            )
        if key.endswith(BLEND) and not 0 <= float(state[key]) <= 1:
            raise ValueError(f"{path} records a blend that is not from 0 to 1: {key} is {float(state[key])}")


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
