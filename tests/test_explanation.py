"""`odconv.explain`: it says what the operator then does, which its log says as well."""

import logging

import pytest
import torch
from torch import nn

import odconv
from odconv.ops import cpu


def sharing(*layers, **options):
    """The first of some layers of KernelWarehouse."""
    odconv.Warehouse({"body": {str(number): layer for number, layer in enumerate(layers)}}, **options)
    return layers[0]


def of_dtype(layer, dtype):
    """A layer, and the warehouse that it may be in, in a dtype."""
    for part in (layer, getattr(layer, "warehouse", None)):
        if part is not None:
            part.to(dtype)
    return layer


LAYERS = {
    "dense": (lambda: odconv.ODConv2d(32, 48, 3, padding=1), (2, 32, 14, 14)),
    "depth-wise": (lambda: odconv.ODConv2d(32, 32, 3, padding=1, groups=32), (4, 32, 7, 7)),
    "one kernel": (lambda: odconv.ODConv2d(32, 64, 1, kernel_num=1), (4, 32, 7, 7)),
    "one sample": (lambda: odconv.CondConv2d(8, 8, 3, groups=2), (1, 8, 9, 9)),
    "one position": (lambda: odconv.DyConv2d(8, 16, 3), (3, 8, 3, 3)),
    "same": (lambda: odconv.DyConv1d(8, 6, 4, padding="same"), (3, 8, 20)),
    "reflected": (lambda: odconv.ODConv3d(4, 6, 3, padding=1, padding_mode="reflect", groups=2), (2, 4, 5, 6, 7)),
    "cells": (lambda: sharing(odconv.KWConv2d(16, 32, 3, padding=1), odconv.KWConv2d(32, 16, 1)), (2, 16, 9, 9)),
    "cells, one sample": (lambda: sharing(odconv.KWConv2d(16, 16, 3, padding="same")), (1, 16, 9, 9)),
    "cells, too few channels": (lambda: sharing(odconv.KWConv2d(12, 16, 3)), (2, 12, 9, 9)),
    "cells, reflected": (lambda: sharing(odconv.KWConv1d(16, 8, 3, padding=1, padding_mode="reflect")), (2, 16, 20)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_explained_is_what_is_done(name, dtype, training, caplog):
    make, shape = LAYERS[name]
    layer = of_dtype(make(), dtype).train(training)
    caplog.set_level(logging.DEBUG, "odconv.ops")
    with torch.set_grad_enabled(training):
        y = layer(torch.randn(shape, dtype=dtype))
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("backend ")]
    found = odconv.explain(layer, shape, training=training)
    assert line.startswith(f"backend {found.backend} for x ")
    assert line.endswith(f": {found.why}")
    assert str(found).startswith(f"{found.backend}: {found.why}\n")
    convolution = y.numel() * torch.Size(layer.kernel_shape[1:]).numel()
    assert convolution <= found.multiply_adds < 8 * convolution
    assert found.bytes > (torch.Size(shape).numel() + layer.parts.numel() + y.numel()) * dtype.itemsize
    assert found.workspace >= 0


def test_costs_by_hand(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: False)
    layer = odconv.DyConv2d(4, 6, 3, kernel_num=2, bias=False)
    found = odconv.explain(layer, (5, 4, 8, 8))
    assert found.backend == "grouped"
    assert found.multiply_adds == 5 * 6 * 36 * 36 + 5 * 2 * 6 * 36  # convolution, mixing
    assert found.bytes == 4 * (5 * 4 * 64 + 2 * 6 * 36 + 5 * 6 * 36 + 5 * 2)
    assert found.workspace == 4 * 5 * 6 * 36


def test_costs_of_cells_by_hand():
    layer = sharing(odconv.KWConv2d(4, 6, 3), odconv.KWConv2d(4, 6, 1), cell_num_ratio=2)  # 9 pieces and 1, 20 cells
    found = odconv.explain(layer, (5, 4, 8, 8))
    assert found.multiply_adds == 5 * 6 * 36 * 36 + 5 * 9 * 20 * 24
    assert found.bytes == 4 * (5 * 4 * 64 + 20 * 24 + 5 * 9 * 20 + 5 * 6 * 36)
    assert found.workspace == 4 * 5 * 6 * 36
    large = sharing(odconv.KWConv2d(512, 512, 3))
    one = 4 * 512 * 512 * 9  # bytes of a kernel; a few samples' are mixed at a time
    assert odconv.explain(large, (8, 512, 8, 8)).workspace == (0 if cpu.available() else 2 * one)
    assert odconv.explain(large, (8, 512, 8, 8), training=True).workspace == 8 * one
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert odconv.explain(large, (8, 512, 8, 8)).workspace == 5 * one // 2
    with pytest.raises(ValueError, match="the KWConv2d has no kernel"):
        odconv.explain(odconv.KWConv2d(4, 6, 3), (5, 4, 8, 8))


def test_layouts_devices_and_autocast_count():
    layer = odconv.ODConv2d(32, 32, 3, padding=1, groups=32)
    assert odconv.explain(layer, (4, 32, 7, 7)).backend == "grouped"
    last = odconv.explain(layer, (4, 32, 7, 7), memory_format=torch.channels_last)
    assert last.backend == ("cpu" if cpu.available() else "grouped")
    assert odconv.explain(layer.to("meta"), (4, 32, 64, 64)).backend == "grouped"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert odconv.explain(odconv.ODConv2d(8, 8, 1), (1, 8, 4, 4)).bytes == 2 * (4 * 8 * 8 + 2 * 128 + 20)


def test_transposed_layers():
    layer = odconv.ODConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1)
    found = odconv.explain(layer, (2, 8, 5, 6))
    assert found.backend == "grouped"
    assert found.workspace == 4 * 2 * 8 * 6 * 9
    y = layer(torch.randn(2, 8, 5, 6))
    gates = sum(gate.numel() for gate in layer.attention(torch.randn(2, 8, 5, 6)) if gate is not None)
    assert found.bytes == 4 * (2 * 8 * 30 + layer.weight.numel() + y.numel() + gates)


@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 7, 5, 5), (2, 8, 2, 2)])
def test_what_does_not_fit_is_named(shape):
    with pytest.raises(ValueError, match=r"shape must be|x must have a map"):
        odconv.explain(odconv.ODConv2d(8, 6, 3), shape)
    with pytest.raises(TypeError, match="layer must be a dynamic layer, got Conv2d"):
        odconv.explain(nn.Conv2d(8, 6, 3), (2, 8, 5, 5))


@pytest.mark.skipif(not cpu.available(), reason="the compiled kernel is not here")
@pytest.mark.parametrize(("threads", "backend"), [(1, "cpu"), (2, "shared")])
def test_a_lone_kernel_of_one_tap_is_scaled_where_several_threads_convolve(threads, backend):
    before = torch.get_num_threads()
    layer = odconv.ODConv2d(64, 128, 1, kernel_num=1).eval().requires_grad_(False)
    try:
        torch.set_num_threads(threads)
        assert odconv.explain(layer, (4, 64, 7, 7)).backend == backend
        compiled = torch.compile(layer, fullgraph=True)(x := torch.randn(4, 64, 7, 7))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(compiled, layer(x), rtol=1e-4, atol=1e-5)
