"""Write weights as safetensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from odconv.checkpoints.keys import ASSIGNMENT, BLEND, FACTORS, NOTED_TEMPERATURE, is_temperature
from odconv.checkpoints.mismatch import check_whole
from odconv.system.files import check_writable, replacing
from odconv.system.text import first_few


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
            published file has, or a blend other than 0, which it lacks; or layers of a model take their kernels from a
            warehouse that is no part of it.
    """
    from safetensors.torch import save

    path = Path(path)
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    record: dict[str, str] = {}
    if isinstance(weights, nn.Module):
        check_whole(weights)
    if published:
        if blends := {float(value) for key, value in state.items() if key.endswith(BLEND)} - {0.0}:
            raise ValueError(f"published must be False unless each blend is 0, got {first_few(sorted(blends))}")
        state = {key: value for key, value in state.items() if not key.endswith((BLEND, ASSIGNMENT))}
        if factors := [key for key in state if key.endswith(FACTORS)]:
            raise ValueError(f"published must be False for layers with a gain or kernel_gain, got {first_few(factors)}")
        temperatures = {key: value for key, value in state.items() if is_temperature(key, state)}
        values = {float(value) for value in temperatures.values()}
        if len(values) > 1:
            raise ValueError(f"published must be False for different temperatures: {first_few(sorted(values))}")
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
