"""What all dynamic layers are: convolutions that have a kernel of its own for every sample."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from odconv.layers.pooling import PoolingAttention
from odconv.ops.contract import Attentions, Geometry, per_axis, positive
from odconv.ops.dynamic_conv import pad_by_name

Size = int | Sequence[int]
Kind = TypeVar("Kind", bound="PerSampleConv")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def below_each_other(fn: Callable[[Tensor], Tensor], shapes: Sequence[Any]) -> Callable[[Tensor], Tensor]:
    """Return what a module's `_apply` does to its tensors, for one that holds n kernels, or cells, as one tensor.

    `Module.to(memory_format=...)` takes a tensor of five axes for the weight of a 3-d convolution: `fn` meets the
    kernels below each other, and the result is made contiguous, as the operator wants it. Sharded and other tensors of
    their own class cannot be flattened, or not in that way.

    Args:
        fn: what is to be applied.
        shapes: those of such tensors, (n, O, C, *k).
    """

    def apply(t: Tensor) -> Tensor:
        if t.shape not in shapes or type(t) not in (Tensor, nn.Parameter):
            return fn(t)
        return fn(t.flatten(0, 1)).contiguous().unflatten(0, t.shape[:2])

    return apply


class PerSampleConv(nn.Module):
    """The base of all dynamic layers: a convolution, an attention, and parts that kernels are mixed of.

    A subclass says how many `dims` it has, whether it is transposed, what its parts are called, which they are, and how
    they are mixed.

    Attributes:
        attention: what says for each sample how the parts are mixed; None in a layer that has no parts yet.
    """

    dims: ClassVar[int]
    transposed: ClassVar[bool] = False
    part: ClassVar[str]
    attention: PoolingAttention | None

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        padding_mode: str,
    ) -> None:
        super().__init__()
        self.in_channels = positive("in_channels", in_channels)
        self.out_channels = positive("out_channels", out_channels)
        self.groups = positive("groups", groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels {in_channels} and out_channels {out_channels}, got {groups}"
            )
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
        self.padding_mode = padding_mode
        self.kernel_size = per_axis("kernel_size", kernel_size, self.dims, least=1)
        self.stride = per_axis("stride", stride, self.dims, least=1)
        self.dilation = per_axis("dilation", dilation, self.dims, least=1)
        self.padding: tuple[int, ...] | str
        if not isinstance(padding, str):
            self.padding = per_axis("padding", padding, self.dims, least=0)
        elif padding not in ("same", "valid"):
            raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
        elif padding == "same" and any(s != 1 for s in self.stride):
            raise ValueError(f"padding 'same' needs stride 1, got {self.stride}")
        else:
            self.padding = padding

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of a sample's kernel, (O, C/groups, *kernel_size), or (C, O/groups, *kernel_size) transposed."""
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        return (first, second // self.groups, *self.kernel_size)

    @property
    def parts(self) -> nn.Parameter:
        """What kernels are mixed of, (n, ...)."""
        raise NotImplementedError

    def kernels(self, attentions: Attentions, dtype: torch.dtype) -> Tensor:
        """Return the kernel that each of B samples is convolved with at some attentions, (B, *kernel_shape)."""
        raise NotImplementedError

    def kernel_blocks(self, attentions: Attentions, numbers: int) -> Iterator[Tensor]:
        """Yield the numbers of B samples' kernels in float32, (B, ...), about as many at a time, in any order."""
        raise NotImplementedError

    def check_input(self, x: Tensor) -> None:
        """Raise an error unless x is a tensor (B, C, *map)."""
        if isinstance(x, fx.Proxy):  # which meets a layer in a network as a node, before this
            raise TypeError(f"torch.fx has nothing to trace in a lone {type(self).__name__}; put it into a network")
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got a {type(x).__name__}")
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            axes = ", ".join("DHW"[3 - self.dims :])
            raise ValueError(f"x must have shape (B, C, {axes}) with C = {self.in_channels}, got {tuple(x.shape)}")

    def padded(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """Return x with the padding that is not zeros at both sides alike, and the geometry that is left."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._margins(), mode=self.padding_mode), (0,) * self.dims
        elif isinstance(padding, str):
            x, padding = pad_by_name(x, padding, self.kernel_size, self.stride, self.dilation)
        return x, Geometry(self.stride, padding, self.dilation, self.groups)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the layer, or record the call as one node where torch.fx traces; hooks are the node's own."""
        if not args and "x" in options:  # hooks, such as those of counters, get what is given by position alone
            args = (options.pop("x"),)
        proxy = next((value for value in (*args, *options.values()) if isinstance(value, fx.Proxy)), None)
        if proxy is None:
            return super().__call__(*args, **options)
        return proxy.tracer.call_module(self, partial(trace_as_leaf, self, proxy.tracer), args, options)  # type: ignore

    @classmethod
    def kinds(cls: type[Kind]) -> Iterator[type[Kind]]:
        """Yield the class and all that derive from it: many programs ask for the class itself."""
        yield cls
        for derived in cls.__subclasses__():
            yield from derived.kinds()

    def __prepare_scriptable__(self) -> NoReturn:
        # what torch.jit.script calls first
        raise TypeError(
            f"{type(self).__name__} cannot be scripted, since its operator chooses its form by the input; use "
            "torch.jit.trace, torch.export or odconv.export"
        )

    def _margins(self) -> list[int]:
        """Return the padding as F.pad wants it: last axis first, both sides."""
        if not isinstance(self.padding, str):
            return [side for p in reversed(self.padding) for side in (p, p)]
        spans = [
            0 if self.padding == "valid" else d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True)
        ]
        return [side for span in reversed(spans) for side in (span // 2, span - span // 2)]

    def extra_repr(self) -> str:
        """Return the arguments that differ from their defaults, as nn.Conv2d prints them."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"padding={self.padding!r}"] if self.padding not in ((0,) * self.dims, "valid") else []
        parts += [f"dilation={self.dilation}"] if self.dilation != (1,) * self.dims else []
        parts += [f"groups={self.groups}"] if self.groups != 1 else []
        parts += ["bias=True"] if any("bias" in name for name, _ in self.named_parameters(recurse=False)) else []
        parts += [f"padding_mode={self.padding_mode!r}"] if self.padding_mode != "zeros" else []
        return ", ".join(parts)


def trace_as_leaf(layer: PerSampleConv, tracer: Any, *args: Any, **options: Any) -> Any:
    """Record a call of a layer as one node of torch.fx, as it records those of nn.Conv2d."""
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, options)
