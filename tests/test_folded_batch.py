"""Layers that fold their batch into the groups of one convolution, and FDConv, which is one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import odconv
from odconv.conversion.folded_batch import UnfoldedBatch


class Gates(nn.Module):
    """Four attentions as FDConv has them: of channels, filters, taps and frequencies, from a pooled map."""

    def __init__(self, channels: int, filters: int, size: int, parts: int) -> None:
        super().__init__()
        self.shapes = ((1, 1, channels, 1, 1), (1, filters, 1, 1, 1), (1, 1, 1, size, size), (parts,))
        self.fc = nn.Conv2d(channels, channels + filters + size * size + parts, 1)

    def forward(self, pooled: torch.Tensor) -> list[torch.Tensor]:
        found = self.fc(pooled).flatten(1).sigmoid() * 2
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        return [part.unflatten(1, shape) for part, shape in zip(found.split(sizes, 1), self.shapes, strict=True)]


class Bands(nn.Module):
    """A map's low frequencies weighed against the others, in float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.float32)
        low = F.interpolate(F.avg_pool2d(x, 2), x.shape[2:])
        return low + self.weight * (x - low)


class Frequency(nn.Conv2d):
    """A layer in the manner of FDConv: the kernels' Fourier coefficients, in parts by frequency, are weighed for each
    sample, and all samples are convolved at once."""

    def __init__(self, channels: int, filters: int, size: int, parts: int = 4, **options) -> None:
        super().__init__(channels, filters, size, **options)
        plane = self.weight.detach().permute(0, 2, 1, 3).reshape(filters * size, -1)
        spectrum = torch.fft.rfft2(plane)
        rows, columns = (torch.fft.fftfreq(n).abs() for n in (plane.shape[0], plane.shape[1]))
        order = (rows[:, None] ** 2 + columns[None, : spectrum.shape[1]] ** 2).flatten().argsort()
        places = torch.stack([order // spectrum.shape[1], order % spectrum.shape[1]])
        self.kernel_num = parts
        self.dft_weight = nn.Parameter(torch.view_as_real(spectrum)[None].clone())
        self.register_buffer("indices", places.reshape(1, 2, parts, -1), persistent=False)
        self.KSM_Global, self.FBM = Gates(channels, filters, size, parts), Bands()
        del self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        channel, filter, spatial, parts = self.KSM_Global(F.adaptive_avg_pool2d(x, 1))
        rows, columns = self.indices[0]
        size, filters = self.kernel_size[0], self.out_channels
        spectrum = torch.zeros(batch, *self.dft_weight.shape[1:], device=x.device)
        spectrum[:, rows, columns] += self.dft_weight[0][rows, columns] * parts[..., None, None]
        plane = torch.fft.irfft2(torch.view_as_complex(spectrum), dim=(1, 2))
        kernels = plane.reshape(batch, filters, size, channels, size).permute(0, 1, 3, 2, 4)
        x = self.FBM(x)
        small = filters * channels * size**2 < (channels + filters) * height * width
        if small:
            kernels = kernels * channel[:, 0] * filter[:, 0] * spatial[:, 0]
        else:
            kernels, x = kernels * spatial[:, 0], x * channel.reshape(batch, -1, 1, 1)
        y = F.conv2d(
            x.reshape(1, -1, height, width), weight=kernels.reshape(-1, channels, size, size), bias=None,
            stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups * batch,
        )  # fmt: skip
        y = y.view(batch, filters, y.size(-2), y.size(-1))
        y = y if small else y * filter.reshape(batch, -1, 1, 1)
        return y if self.bias is None else y + self.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_folded_convolution_is_that_of_the_batch(dims, groups, batch, bias):
    torch.manual_seed(0)
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    x = torch.randn(batch, 4, *range(5, 5 + dims), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(batch * 6, 4 // groups, *[3] * dims, dtype=torch.float64, requires_grad=True)
    own = torch.randn(batch * 6, dtype=torch.float64, requires_grad=True) if bias else None
    given = [tensor for tensor in (x, weight, own) if tensor is not None]

    def computed() -> tuple[torch.Tensor, ...]:
        folded = x.reshape(1, batch * 4, *x.shape[2:])
        y = conv(folded, weight, own, 2, padding=1, groups=groups * batch)
        return y, *torch.autograd.grad(y.square().sum(), given)

    wanted = computed()
    with UnfoldedBatch(batch):
        found = computed()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_other_convolutions_are_left_alone(monkeypatch):
    monkeypatch.setattr("odconv.conversion.folded_batch.per_sample_conv", None)
    x, weight = torch.randn(2, 6, 5, 5), torch.randn(6, 1, 3, 3)
    with UnfoldedBatch(2):
        F.conv2d(x, weight, groups=6)
        nn.Conv2d(6, 4, 3)(x[:1])
        nn.Conv1d(6, 6, 1, groups=3)(x[:1, :, 0])


@pytest.mark.parametrize("size", [9, 4])
@pytest.mark.parametrize("train", [False, True])
def test_fdconv_computes_what_it_did_with_all_gradients(size, train):
    torch.manual_seed(0)
    layer = Frequency(20, 24, 3, padding=1).train(train)
    keys = [*layer.state_dict()]
    x = torch.randn(3, 20, size, size + 1, requires_grad=True)
    found = []
    for _ in range(2):
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().mean(), [x, *layer.parameters()])))
        report = odconv.accelerate(layer)
    assert str(report).startswith("0 of 1")  # the second time: it is accelerated already
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert [*layer.state_dict()] == keys
    odconv.restore_forward(layer)
    torch.testing.assert_close(layer(x), found[0][0], rtol=0, atol=0)


@torch.no_grad()
def test_accelerated_fdconv_becomes_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 20, 1), Frequency(20, 24, 3, padding=1)).eval()
    with pytest.raises(ValueError, match="cannot be exported"):
        odconv.export_onnx(model, tmp_path / "own.onnx", (3, 8, 8))
    odconv.accelerate(model)
    odconv.export_onnx(model, tmp_path / "ours.onnx", (3, 8, 8))
    session = runtime.InferenceSession(tmp_path / "ours.onnx")
    x = torch.randn(3, 3, 8, 8)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_accelerated_fdconv_compiles_and_is_exported_with_any_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 20, 1), Frequency(20, 24, 3, padding=1, stride=2)).eval()
    x = torch.randn(3, 3, 8, 8)
    wanted = model(x)
    assert str(odconv.accelerate(model)).startswith("1 of 1 dynamic layers accelerated\n1  FDConv")
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), wanted, rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=1)},)).module()
    for batch in (1, 2, 3):
        torch.testing.assert_close(program(x[:batch]), wanted[:batch], rtol=1e-4, atol=1e-5)


def test_fdconv_that_fails_by_itself_is_left():
    layer = Frequency(20, 24, 3)
    layer.indices = layer.indices + 10_000
    (decision,) = odconv.accelerate(layer).layers
    assert "fails on a small input" in decision.reason
