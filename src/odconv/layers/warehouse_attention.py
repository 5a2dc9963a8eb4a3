"""The attention of KernelWarehouse: how much of every cell goes into each piece of a sample's kernel."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odconv.layers.attention import leave_as_drawn
from odconv.layers.parts import call_in_dtype, hidden_width, normalise_one
from odconv.layers.pooling import PoolingAttention, pool
from odconv.layers.starts import check_start, draw_calm_warehouse, draw_published_warehouse
from odconv.ops.contract import Attentions, is_traced
from odconv.system.modules import check_module

NORMS = ("batch", "layer")
EPSILON = 1e-3
"""Added to the sum of a row's logits, as published; it needs float32."""


class Assignment(NamedTuple):
    """Where a layer's kernel lies in its warehouse.

    Attributes:
        pieces: for each of the m pieces of the kernel the cell that it is at blend 1; n for none of them, zeros.
        start: the first of the layer's own cells.
        cells: the number n of cells in the warehouse.
        local: how many cells from `start` on an attention with a basis has logits of its own for.
    """

    pieces: tuple[int, ...]
    start: int
    cells: int
    local: int


class WarehouseAttention(PoolingAttention):
    """The contrasting-driven attention: a row of n signed shares for each of the m pieces of a kernel.

    Logits are divided by the sum of their sizes, so that the sizes of a row's shares sum to 1, with one logit more than
    there are cells: that share contributes nothing. The blend mixes the rows with the fixed assignment of pieces to
    cells: 1 is a static kernel, 0 the attention alone.

    Args:
        in_channels: channels C of the input.
        assignment: where the layer's kernel lies in the warehouse.
        reduction: width of the hidden layer as a share of C; it is 16 at least.
        norm: norm of the hidden layer: "batch", or "layer", with which that has a bias.
        basis_ratio: below 1, logits of other layers' cells are mixed of max(16, their number times this) ones.
        init: how it is drawn: "calm", at its assignment and to train from the first step (see docs/starts.md), or
            "published".
        size: norm of a cell as it is drawn; calm shares move as fast as cells of that size do.
        device: where the parameters live.
        dtype: dtype of the parameters. The attention is computed in at least float32 whatever it is.
    """

    def __init__(
        self,
        in_channels: int,
        assignment: Assignment,
        *,
        reduction: float = 1 / 16,
        norm: str = "batch",
        basis_ratio: float = 1.0,
        init: str = "calm",
        size: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if not 0 < basis_ratio < math.inf:
            raise ValueError(f"basis_ratio must be a positive number, got {basis_ratio!r}")
        check_start(init)
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = hidden_width(in_channels, reduction, 16)
        pieces, cells = len(assignment.pieces), assignment.cells
        self.place, self.norm, self.init, self.size = assignment, norm, init, size
        self.basis_bias: nn.Parameter | None = None
        self.fc1 = nn.Linear(in_channels, hidden, bias=norm == "layer", **placed)
        self.norm1: nn.Module = (nn.LayerNorm if norm == "layer" else nn.BatchNorm1d)(hidden, **placed)
        self.fc3: nn.Linear | None
        if basis_ratio >= 1:
            self.fc2 = nn.Linear(hidden, pieces * (cells + 1), **placed)
            self.fc3 = None
        else:
            foreign = cells - assignment.local
            basis = max(int(foreign * basis_ratio), 16)
            self.basis_bias = nn.Parameter(torch.empty(pieces * (cells + 1), **placed))
            self.fc2 = nn.Linear(hidden, (assignment.local + basis + 1) * pieces, bias=False, **placed)
            self.fc3 = nn.Linear(basis, foreign, bias=False, **placed)
        self.blend: Tensor
        self.assignment: Tensor
        self.register_buffer("blend", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("assignment", torch.tensor(assignment.pieces, device=device))
        self.register_load_state_dict_pre_hook(check_place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as `init` says, and go back to the first statistics."""
        norm: Any = self.norm1
        type(norm).reset_parameters(norm)  # its own was replaced below
        for part in self.children():
            part.reset_parameters = leave_as_drawn  # type: ignore[assignment]
        draw = draw_calm_warehouse if self.init == "calm" else draw_published_warehouse
        draw(self)

    def set_blend(self, value: float) -> None:
        """Mix the shares with the fixed assignment from now on.

        Args:
            value: 0 for the attention alone, to 1 for the assignment alone.

        Raises:
            ValueError: value is not from 0 to 1, or the blend is on the meta device.
        """
        check_blend(value)
        if self.blend.is_meta:
            raise ValueError(f"blend {value} cannot be set on the meta device: set it after to_empty")
        self.blend.fill_(value)  # in place: a compiled network reads the new value without recompiling

    def forward(self, x: Tensor) -> Tensor:
        """Return the shares of the cells in each piece of each sample's kernel, (B, m, n), in float32 or float64.

        Args:
            x: the layer's input, (B, C, *map).
        """
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            dtype = torch.promote_types(x.dtype, torch.float32)
            pooled = pool(x, self.extent, dtype)
            logits = self._logits(self._normalise(call_in_dtype(self.fc1, pooled)).relu())
            size = logits.abs().sum(-1, keepdim=True) + EPSILON
            kept = logits.requires_grad and not is_traced()  # for the backward pass, before which another may be set
            blend = (self.blend.clone() if kept else self.blend).to(dtype)
            fixed = self.assignment[:, None] == torch.arange(self.place.cells, device=self.assignment.device)
            return logits[..., :-1] * ((1 - blend) / size) + blend * fixed.to(dtype)

    def named(self, found: Tensor) -> Attentions:
        """Return what :meth:`forward` returned by name: shares of cells take the place of those of kernels."""
        return Attentions(kernel=found)

    def range_of(self, kind: str) -> tuple[float, float]:
        """Return between which values an attention lies."""
        return -1.0, 1.0

    def _normalise(self, z: Tensor) -> Tensor:
        norm = self.norm1
        if isinstance(norm, nn.BatchNorm1d) and norm.training and z.shape[0] == 1:
            return normalise_one(norm, z)
        return call_in_dtype(norm, z)

    def _logits(self, z: Tensor) -> Tensor:
        """Return the logits of cells and of none of them, (B, m, n + 1), of the hidden layer."""
        pieces, start, cells, local = self.place
        z = call_in_dtype(self.fc2, z)
        if self.fc3 is None:
            return z.reshape(-1, len(pieces), cells + 1)
        assert self.basis_bias is not None
        own, basis, none = z.reshape(-1, len(pieces), local + self.fc3.in_features + 1).split(
            [local, self.fc3.in_features, 1], -1
        )
        others = call_in_dtype(self.fc3, basis)
        logits = torch.cat([others[..., :start], own, others[..., start:], none], -1)
        return logits + self.basis_bias.to(z.dtype).view(len(pieces), cells + 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WarehouseAttention":
        # What the layer knows can leave the meta device, which other tensors cannot; the blend stays float32.
        blend = torch.zeros(()) if self.blend.is_meta else self.blend
        super()._apply(fn, recurse)
        device = self.fc1.weight.device
        self.blend = blend.to(device)
        self.assignment = torch.tensor(self.place.pieces, device=device)
        return self


def check_place(
    attention: WarehouseAttention,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Refuse weights of another assignment, and fill in what published files do not hold: blend and assignment."""
    for name, own in (("blend", attention.blend), ("assignment", attention.assignment)):
        key, given = f"{prefix}{name}", state.get(f"{prefix}{name}")
        known = isinstance(given, Tensor) and not given.is_meta and given.shape == own.shape
        if given is None:
            state[key] = torch.zeros(()) if own.is_meta and name == "blend" else own.clone()
        elif known and name == "blend":
            state[key] = given.float()
            if not 0 <= given.item() <= 1:
                errors.append(f"{key} must be from 0 to 1, got {given.item()}")
        elif known and given.tolist() != [*attention.place.pieces]:
            errors.append(f"{key}: {other_assignment(given.tolist(), attention.place.pieces)}")


def other_assignment(theirs: Sequence[int], own: Sequence[int]) -> str:
    """Return in words how two assignments differ."""
    piece = next(p for p, (a, b) in enumerate(zip(theirs, own, strict=True)) if a != b)
    return (
        "the weights are of a network whose layers were put into the warehouse in another order: piece "
        f"{piece} of this layer's kernel is cell {theirs[piece]} there, and cell {own[piece]} here"
    )


def check_blend(value: float) -> None:
    """Raise a ValueError unless `value` is a share."""
    if not 0 <= value <= 1:
        raise ValueError(f"blend must be from 0 (the attention alone) to 1 (a static kernel), got {value!r}")


def try_blend(model: nn.Module, value: float) -> bool:
    """Set the blend of every layer of KernelWarehouse, and return whether there are any."""
    check_module(model)
    check_blend(value)
    attentions = [part for part in model.modules() if isinstance(part, WarehouseAttention)]
    for attention in attentions:
        attention.set_blend(value)
    return bool(attentions)


def set_blend(model: nn.Module, value: float) -> None:
    """Set the blend of every layer of KernelWarehouse in a network.

    Args:
        model: any module; one without such layers is left as it is, with a warning.
        value: 1 for static kernels, each piece one cell, to 0 for the attention alone. The published schedule falls
            from 1 to 0 over the first epochs; see :func:`odconv.set_progress`.

    Raises:
        ValueError: value is not from 0 to 1, or a blend is on the meta device.
    """
    if not try_blend(model, value):
        warnings.warn(f"no layer of the {type(model).__name__} has a blend: none was set", stacklevel=2)
