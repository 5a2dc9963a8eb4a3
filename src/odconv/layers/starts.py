"""How dynamic layers are drawn: so that they train from the first step, or as the authors of their method draw them.

A start is initialisation alone: keys, shapes and formulas are the same under both, and every checkpoint fits either.
docs/starts.md derives the constants.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from odconv.layers.attention import Attention
    from odconv.layers.warehouse_attention import WarehouseAttention

STARTS = ("calm", "published")

LOGIT = 0.03
"""Standard deviation of a new logit over images: about 0.2 / sqrt(L) for L = 50 dynamic layers."""

SETTLED: dict[str, dict[str, Any]] = {
    "odconv": {"norm": "layer", "gain": 2.0, "kernel_gain": "sqrt"},
    "dyconv": {"norm": "layer", "kernel_gain": "sqrt"},
    "condconv": {"norm": "layer"},
}
"""Options with which new layers learn best: gates of 1, mixtures as large as a kernel, and images that stay as alike as
they are. They are no defaults of the layers, since they make another formula than the published one."""

WARM_GATES: dict[str, Any] = {"gain": 2.0, "temperature": 5.0}
"""Options with which gates begin at trained kernels: at 1, halfway up their sigmoids. There they answer to every step,
for all that they scale at once: with logits divided by 5, a step of SGD moves them a 25th as far.

Rows: finetune.csv, "start=warm_1x" and "start=warm_4x", init=calm against "init=full pace".
"""

WARM_SHARES: dict[str, Any] = {"kernel_gain": "sqrt"}
"""The same of shares: a mixture takes as large a step of SGD as one kernel does."""

WARM_ROUTERS = SETTLED["condconv"]
"""The same of CondConv's router, which has no temperature: without a norm it runs away with trained kernels.

Rows: warm.csv, method=condconv_8x, optimizer=sgd, "pace=warm" against "pace=full".
"""

WARM_SIGMOIDS = 2.0
"""What CondConv's sigmoids sum to around trained kernels, at most: as the shares of ODConv's four kernels do.

A step of Adam moves the mixture so many times as far as one kernel. At 1/2 each, eight sum to 4, and Adam is behind.

Rows: warm.csv, method=condconv_8x, optimizer=adamw, lr=0.004, "pace=warm" against "pace=sigmoids of 1/2".
"""

PACE = {"batch": 0.2, "group": 0.5, "layer": 0.5, "none": 0.2}
"""Size of what the heads read, by the norm before them: a step of SGD moves their logits by its square, one of Adam by
itself. Batch norm spreads the images of a batch however alike they are; the others leave them as alike as they were."""

ROUTED = 2.0
"""Squared length of what a router behind layer norm reads: that of 16 hidden units of ODConv at their pace.

Without the norm it grows with the number of features, and the routing runs away at usual learning rates.

Rows: accuracy.csv, method=condconv, "start=calm" against "start=settled".
"""

BIAS = 3.0
"""Least bias of KernelWarehouse's calm start: with 1, shares of small cells run away, those of depth-wise layers first.

Rows: accuracy.csv, "start=calm (bias 1)"; starts.csv.
"""

OPEN = 0.98
"""Where sigmoid gates begin, or at 1 where their gain allows it: they take little off a kernel's size."""


def check_start(init: str) -> None:
    """Raise a ValueError unless `init` names a start."""
    if init not in STARTS:
        raise ValueError(f"init must be one of {STARTS}, got {init!r}")


@torch.no_grad()
def draw_kernels(weight: Tensor, transposed: bool, divisor: float = 1.0) -> None:
    """Draw each of n kernels as a convolution's, Kaiming normal (fan-out, ReLU).

    Args:
        weight: (n, O, C/groups, *kernel_size), or (n, C, O/groups, *kernel_size) of a transposed layer; drawn as one,
            for a sharded tensor has no kernels to loop over.
        transposed: which of the two it is.
        divisor: how much smaller to draw them.
    """
    filters = weight.shape[2 if transposed else 1]
    nn.init.normal_(weight, std=math.sqrt(2 / (filters * math.prod(weight.shape[3:]))) / divisor)


def mixture_size(attention: "Attention", kernel_num: int) -> float:
    """Return how large a mixture of n new kernels of size 1 is under a calm start, which hardly moves the logits."""
    shares = 1.0
    if "kernel" in attention.heads:
        softmax = attention.kernel_gate == "softmax"
        shares = attention.kernel_gain / math.sqrt(kernel_num) if softmax else math.sqrt(kernel_num) / 2
    gates = len(attention.heads.keys() - {"kernel"})
    return shares * (attention.gain * open_share(attention.gain)) ** gates


def open_share(gain: float) -> float:
    """Return where the sigmoid of a gate begins: at `OPEN`, or below, where its gain makes 1 of it."""
    return min(OPEN, 1 / gain)


@torch.no_grad()
def draw_published(attention: "Attention") -> None:
    """Draw an attention as published: Kaiming normal (fan-out, ReLU), CondConv's router Glorot uniform, biases 0."""
    draw_layers(attention.linear_layers(), glorot=attention.kernel_gate == "sigmoid")


def draw_layers(layers: Iterable[Any], glorot: bool = False) -> None:
    """Draw linear layers: Kaiming normal (fan-out, ReLU) or Glorot uniform, biases 0."""
    for layer in layers:
        if glorot:
            nn.init.xavier_uniform_(layer.weight)
        else:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def draw_calm(attention: "Attention") -> None:
    """Draw an attention whose logits are small, alike for all widths and methods, and move slowly.

    A head of h inputs is normal with variance 2 LOGIT^2 / h, whatever its outputs. What it reads has the size PACE,
    by the weight of the norm before it or else of the hidden layer, and the head is divided by that. CondConv's router
    reads the pooled input: as large as the network makes it, or of size ROUTED behind layer norm.
    """
    draw_published(attention)
    pace = PACE[attention.norm] if attention.fc is not None else 1.0
    scale: Any = getattr(attention.bn, "weight", None)
    if attention.fc is None and scale is not None:
        pace = math.sqrt(2 * ROUTED / scale.numel())
        nn.init.constant_(scale, pace / math.sqrt(2))  # as ReLU makes it behind a hidden layer
    elif scale is not None:
        nn.init.constant_(scale, pace)
    elif attention.fc is not None and attention.bn is None:
        nn.init.normal_(attention.fc.weight, std=pace * math.sqrt(2 / attention.fc.weight.shape[1]))
    share = open_share(attention.gain)
    for name in attention.heads:
        head = getattr(attention, f"{name}_fc")
        nn.init.normal_(head.weight, std=LOGIT / pace * math.sqrt(2 / head.weight.shape[1]))
        nn.init.constant_(head.bias, 0.0 if name == "kernel" else math.log(share / (1 - share)))


@torch.no_grad()
def draw_warm(attention: "Attention", kernel_num: int) -> float:
    """Set an attention to the same gates and shares for all samples, as beside trained kernels.

    With heads of zero every sigmoid is 1/2 and every softmax 1/n. CondConv's sigmoids have a bias, by which they sum to
    WARM_SIGMOIDS at most, and what its router reads is so small that its logits move as slowly as with the temperature
    of WARM_GATES. With `init="published"` it has neither.

    Rows: warm.csv, method=condconv_8x, optimizer=sgd, lr=0.05, "pace=warm" against "pace=router of full size".

    Returns:
        What the shares of the n kernels sum to.
    """
    for name in attention.heads:
        head = getattr(attention, f"{name}_fc")
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    if attention.kernel_gate != "sigmoid":
        return attention.kernel_gain if kernel_num > 1 else 1.0
    if attention.init == "published":
        return kernel_num / 2
    shares = min(kernel_num / 2, WARM_SIGMOIDS)
    router: Any = attention.kernel_fc
    nn.init.constant_(router.bias, math.log(shares / (kernel_num - shares)))
    if isinstance(scale := getattr(attention.bn, "weight", None), Tensor):
        nn.init.constant_(scale, math.sqrt(ROUTED / scale.numel()) / WARM_GATES["temperature"])
    return shares


@torch.no_grad()
def draw_published_warehouse(attention: "WarehouseAttention") -> None:
    """Draw an attention of KernelWarehouse as published: Kaiming normal (fan-out, ReLU), biases 0."""
    draw_layers(layer for layer in (attention.fc1, attention.fc2, attention.fc3) if layer is not None)
    if attention.basis_bias is not None:
        nn.init.zeros_(attention.basis_bias)


@torch.no_grad()
def draw_calm_warehouse(attention: "WarehouseAttention") -> None:
    """Draw an attention of KernelWarehouse that begins at its assignment, whatever the blend, and moves slowly.

    The bias is s for the cell that a piece is assigned to. The other logits of a row, small and normal, have sizes that
    sum to about s LOGIT: a row's shares are divided by the sum of its logits' sizes, and the more cells there are, the
    more a row would differ from image to image. A step moves a kernel by its shares (size / s)^2 times as far as by its
    cells: s is the cells' size, and at least BIAS.
    """
    scale = max(BIAS, attention.size)
    draw_published_warehouse(attention)
    outputs = attention.place.cells + 1
    if isinstance(weight := attention.norm1.weight, Tensor):
        nn.init.constant_(weight, PACE[attention.norm])
    hidden = attention.fc2.weight.shape[1]
    nn.init.normal_(attention.fc2.weight, std=scale * LOGIT / outputs / PACE[attention.norm] * math.sqrt(2 / hidden))
    bias: Any = attention.fc2.bias if attention.basis_bias is None else attention.basis_bias
    if bias.is_meta or not bias.any():  # torch.nn.init leaves alone what transformers has loaded
        chosen = scale * nn.functional.one_hot(attention.assignment, outputs).to(bias.dtype).flatten()
        bias.copy_(placed_like(chosen, bias))


def placed_like(tensor: Tensor, parameter: Any) -> Tensor:
    """Return a tensor of a parameter's shape, sharded as that is by FSDP2, or as it is."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
