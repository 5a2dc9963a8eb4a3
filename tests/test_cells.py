"""Kernels that are put together of cells: the compiled form against one kernel a sample, and what it may be asked."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import odconv
from odconv.ops import cpu
from odconv.ops.cells import assemble, cell_conv, cut
from odconv.ops.mixing import mixed_conv

NEEDS_KERNEL = pytest.mark.skipif(not cpu.available(), reason="the compiled kernel is not here")

# batch, cell (filters, channels), blocks of them, taps, map, stride, padding, dilation, cells
SHAPES = [
    (2, (64, 64), (1, 1), (3, 3), (14, 14), 1, 1, 1, 36),
    (3, (32, 64), (2, 2), (3, 3), (15, 13), 2, 1, 1, 40),
    (1, (20, 24), (2, 1), (3,), (17,), 1, 2, 2, 5),
    (2, (16, 16), (3, 2), (1, 1), (7, 7), 1, 0, 1, 7),
    (2, (16, 17), (1, 2), (3, 2, 3), (5, 6, 7), (1, 2, 1), 1, 1, 9),
    (5, (80, 32), (1, 1), (3, 3), (4, 4), 1, 1, 1, 300),  # cells that fill the cache
    (2, (70, 33), (2, 3), (5, 1), (9, 2), 1, (2, 0), 1, 3),
]


def problem(batch, cell, blocks, taps, size, stride, padding, dilation, count, dtype=torch.float64):
    """Return x, cells, shares, the shape of a kernel, and the geometry."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=dtype)
    shape = (cell[0] * blocks[0], cell[1] * blocks[1], *taps)
    pieces = math.prod(taps) * math.prod(blocks)
    cells = draw(count, *cell, *(1,) * len(taps))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    return draw(batch, shape[1], *size), cells, draw(batch, pieces, count) / count, shape, geometry


def mixed_first(x, cells, shares, shape, geometry):
    """Convolve with kernels that are in memory, which per_sample_conv is tested to do."""
    return mixed_conv(x, partial(assemble, shape=shape), cells, shares, shape, **geometry)


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("taps", [(3, 3), (1, 1)], ids=str)
def test_autocast_is_the_layer_in_float32_rounded(taps, grad, dtype):
    x, cells, shares, kernel, geometry = problem(3, (16, 32), (2, 2), taps, (7, 6), 1, taps[0] // 2, 1, 5)
    leaves = [tensor.float().requires_grad_(grad) for tensor in (x, cells, shares)]
    with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
        found = cell_conv(*leaves, kernel, **geometry)
    wanted = mixed_first(
        x.requires_grad_(grad), cells.requires_grad_(grad), shares.requires_grad_(grad), kernel, geometry
    )
    assert found.dtype == dtype
    few = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=few, atol=few * wanted.abs().max().item())
    if grad:
        upstream = torch.randn_like(wanted)
        gradients = torch.autograd.grad(found, leaves, upstream.to(dtype))
        expected = torch.autograd.grad(wanted, (x, cells, shares), upstream)
        for value, like in zip(gradients, expected, strict=True):
            assert value.dtype == torch.float32
            assert ((value.double() - like).norm() / like.norm()).item() < few


def test_pieces_are_cut_as_they_are_put_together():
    kernel = torch.randn(12, 8, 3, 2)
    for cell in ((4, 2, 1, 1), (12, 8, 3, 2)):
        pieces = cut(kernel, cell)
        assert assemble(pieces, torch.eye(len(pieces))[None], kernel.shape).equal(kernel[None])


@NEEDS_KERNEL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_cells_are_mixed_tile_by_tile_as_whole_kernels_are(shape, last):
    x, cells, shares, kernel, geometry = problem(*shape)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert cpu.fits_cells(x, cells, x.dtype, 1)
    with torch.no_grad():
        found = cell_conv(x, cells, shares, kernel, **geometry)
    wanted = mixed_first(x, cells, shares, kernel, geometry)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert found.stride() == wanted.stride()


@NEEDS_KERNEL
@settings(max_examples=40)
@given(
    batch=st.integers(1, 4),
    cell=st.tuples(st.integers(16, 40), st.integers(16, 40)),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    count=st.integers(1, 20),
)
def test_any_cells(batch, cell, blocks, taps, size, stride, padding, count):
    x, cells, shares, kernel, geometry = problem(batch, cell, blocks, taps, size, stride, padding, 1, count)
    with torch.no_grad():
        found = cell_conv(x, cells, shares, kernel, **geometry)
    torch.testing.assert_close(found, mixed_first(x, cells, shares, kernel, geometry), rtol=1e-10, atol=1e-10)


@NEEDS_KERNEL
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        (2, (16, 16), (1, 1), (1, 2), (9, 9), 3, 0, 1, 4),
        (230, (16, 16), (2, 1), (3, 3), (3, 3), 1, 1, 1, 3),  # more samples than are held at a time
    ],
    ids=str,
)
def test_all_gradients(shape):
    *given, kernel, geometry = problem(*shape)
    leaves = [tensor.requires_grad_() for tensor in given]
    found, wanted = cell_conv(*leaves, kernel, **geometry), mixed_first(*leaves, kernel, geometry)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    grad = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), expected, rtol=1e-10, atol=1e-10)
    for number, leaf in enumerate(leaves):  # each alone, and of a gradient that is no memory of its own
        other = [t if t is leaf else t.detach() for t in leaves]
        alone = torch.autograd.grad(cell_conv(*other, kernel, **geometry).sum(), leaf)[0]
        whole = torch.autograd.grad(mixed_first(*other, kernel, geometry).sum(), leaf)[0]
        torch.testing.assert_close(alone, whole, rtol=1e-10, atol=1e-10, msg=f"{number}")


@NEEDS_KERNEL
def test_no_kernel_is_kept_for_the_backward_pass():
    *given, kernel, geometry = problem(*SHAPES[0])
    leaves = [tensor.requires_grad_() for tensor in given]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        cell_conv(*leaves, kernel, **geometry)
    assert sorted(kept) == sorted(leaf.numel() for leaf in leaves)


@NEEDS_KERNEL
def test_gradients_can_be_differentiated_again():
    *given, kernel, geometry = problem(2, (16, 16), (1, 1), (3,), (4,), 1, 1, 1, 2)
    leaves = [tensor.requires_grad_() for tensor in given]
    penalties = [
        torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        for y in (cell_conv(*leaves, kernel, **geometry), mixed_first(*leaves, kernel, geometry))
    ]
    found, wanted = (torch.autograd.grad(sum(g.square().sum() for g in gs), leaves) for gs in penalties)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@NEEDS_KERNEL
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_depend_neither_on_threads_nor_on_the_rest_of_the_batch(shape):
    x, cells, shares, kernel, geometry = problem(*shape, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = [tensor.clone().requires_grad_() for tensor in (x, cells, shares)]
            y = cell_conv(*leaves, kernel, **geometry)
            found.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
    y = found[0][0].detach()
    with torch.no_grad():
        for b in range(len(x)):
            assert torch.equal(cell_conv(x[b : b + 1], cells, shares[b : b + 1], kernel, **geometry)[0], y[b])
    exact = mixed_first(x.double(), cells.double(), shares.double(), kernel, geometry)
    assert (y - exact).abs().max() < 1e-5 * exact.abs().max()


@NEEDS_KERNEL
def test_what_has_no_compiled_form_is_mixed_first():
    x, cells, shares, kernel, geometry = problem(*SHAPES[0], dtype=torch.float32)
    wanted = mixed_first(x, cells, shares, kernel, geometry)
    assert not cpu.fits_cells(x, cells[:, :8], x.dtype, 1)  # a vector would be half empty
    assert not cpu.fits_cells(x, cells, x.dtype, 2)
    assert not cpu.fits_cells(x, cells.expand(-1, -1, -1, 3, 3), x.dtype, 1)
    assert not cpu.fits_cells(x[:0], cells, x.dtype, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = cell_conv(x, cells, shares, kernel, **geometry)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=0.05, atol=0.05)
    each = torch.func.vmap(lambda x, s: cell_conv(x[None], cells, s[None], kernel, **geometry)[0])
    torch.testing.assert_close(each(x, shares), wanted, rtol=1e-4, atol=1e-4)
    assert cell_conv(x[:0], cells, shares[:0], kernel, **geometry).shape == (0, *wanted.shape[1:])


@NEEDS_KERNEL
def test_the_operator_is_registered_as_operators_should_be():
    for last in (False, True):
        x, cells, shares, (filters, _, *taps), _ = problem(*SHAPES[1])
        x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        arguments = (x, cells, shares, filters, taps, [2, 1], [1, 0], [1, 1])
        torch.library.opcheck(torch.ops.odconv.conv_cells.default, arguments)
        grad = torch.ops.odconv.conv_cells(*arguments).clone()
        for wanted in ((True, True), (True, False), (False, True)):
            given = (grad, x, cells, shares, *arguments[4:], *wanted)
            torch.library.opcheck(torch.ops.odconv.conv_cells_backward.default, given)


@NEEDS_KERNEL
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_network_computes_the_same(training):
    torch.manual_seed(0)
    layer = odconv.KWConv2d(16, 32, 3, padding=1)
    odconv.Warehouse({"all": {"layer": layer}}, cell_num_ratio=2)
    layer.eval()
    x = torch.randn(3, 16, 6, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if training:
        found, wanted = (torch.autograd.grad(f(x).square().sum(), [*layer.parameters()]) for f in (compiled, layer))
    else:
        with torch.no_grad():
            found, wanted = compiled(x), layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@NEEDS_KERNEL
def test_pytorch_counts_the_multiply_adds():
    model = odconv.create_model("kw_resnet18", num_classes=10).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 64, 64))
    wanted = odconv.profile(model, (3, 64, 64)).madds
    assert counter.get_total_flops() / 4 == pytest.approx(wanted, rel=0.01)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert 2.8 < counter.get_total_flops() / 4 / wanted < 4.2  # mixing once more, and twice for its gradients


def operands(**changes):
    """Return arguments of the operator that fit, but for some."""
    arguments = {
        "x": torch.ones(2, 32, 5, 5),
        "cells": torch.ones(3, 16, 16, 1, 1),
        "shares": torch.ones(2, 9 * 3 * 2, 3),
        "filters": 48,
        "taps": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
    }
    return (arguments | changes).values()


WRONG = {
    "cells of several taps": {"cells": torch.ones(3, 16, 16, 3, 3)},
    "cells of other axes": {"cells": torch.ones(3, 16, 16, 1)},
    "no cells": {"cells": torch.ones(0, 16, 16, 1, 1), "shares": torch.ones(2, 54, 0)},
    "cells of doubles": {"cells": torch.ones(3, 16, 16, 1, 1).double()},
    "strided cells": {"cells": torch.ones(3, 16, 32, 1, 1)[:, :, ::2]},
    "cells that do not divide the channels": {"cells": torch.ones(3, 16, 20, 1, 1)},
    "cells that do not divide the filters": {"cells": torch.ones(3, 20, 16, 1, 1)},
    "filters below 0": {"filters": -48},
    "no filters": {"filters": 0},
    "a piece too few": {"shares": torch.ones(2, 53, 3)},
    "a share too many": {"shares": torch.ones(2, 54, 4)},
    "shares of another batch": {"shares": torch.ones(3, 54, 3)},
    "shares of doubles": {"shares": torch.ones(2, 54, 3).double()},
    "strided shares": {"shares": torch.ones(2, 3, 54).transpose(1, 2)},
    "an empty batch": {"x": torch.ones(0, 32, 5, 5), "shares": torch.ones(0, 54, 3)},
    "integers": {"x": torch.ones(2, 32, 5, 5, dtype=torch.int64)},
    "halves": {"x": torch.ones(2, 32, 5, 5).half()},
    "no taps": {"taps": [0, 3]},
    "one tap's axis": {"taps": [3]},
    "huge taps": {"taps": [2**62, 2**62]},
    "taps beyond the map": {"taps": [9, 3]},
    "stride 0": {"stride": [0, 1]},
    "padding below 0": {"padding": [-1, 1]},
    "huge dilation": {"dilation": [2**62, 1]},
}


@NEEDS_KERNEL
@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_the_operator_refuses_what_does_not_fit(changes):
    with pytest.raises(RuntimeError, match="odconv: "):
        torch.ops.odconv.conv_cells(*operands(**changes))
    x, cells, shares, filters, *geometry = operands(**changes)
    with pytest.raises(RuntimeError, match="odconv: "):
        torch.ops.odconv.conv_cells_backward(
            torch.ones(2, max(0, filters), 5, 5), x, cells, shares, *geometry, True, True
        )


@NEEDS_KERNEL
def test_the_operator_takes_what_fits():
    y = torch.ops.odconv.conv_cells(*operands())
    assert y[0, 0, 2, 2] == 32 * 9 * 3
    x, cells, shares, _, *geometry = operands()
    found = torch.ops.odconv.conv_cells_backward(y, x, cells, shares, *geometry, True, True)
    assert [one.shape for one in found] == [x.shape, cells.shape, shares.shape]
    for grad in (y[:1], y[..., :4], y.double(), y[:, :47], y[0], torch.ones(2, 0, 5, 5)):
        with pytest.raises(RuntimeError, match="odconv: "):
            torch.ops.odconv.conv_cells_backward(grad, x, cells, shares, *geometry, True, True)
