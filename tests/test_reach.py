"""Kernels without the taps that meet padding alone."""

import copy
import itertools
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import odconv
from odconv.functional import dynamic_conv, mixed_conv, per_sample_conv
from odconv.ops.cells import assemble, cell_conv
from odconv.ops.contract import Geometry
from odconv.ops.reach import reached, within_reach

GEOMETRIES = [
    axis
    for axis in itertools.product(range(1, 6), range(1, 8), range(1, 4), range(8), range(1, 4))
    if axis[0] + 2 * axis[3] >= axis[4] * (axis[1] - 1) + 1
]
"""Extent, taps, stride, padding and dilation of maps as large as the kernel's span."""


def test_the_taps_that_are_left_compute_the_same() -> None:
    random, fewer = torch.Generator().manual_seed(0), 0
    for extent, taps, stride, padding, dilation in GEOMETRIES:
        first, end = reached(extent, taps, stride, padding, dilation)
        fewer += (first, end) != (0, taps)
        x, weight = (torch.randn(1, 1, size, dtype=torch.float64, generator=random) for size in (extent, taps))
        y = F.conv1d(x, weight, None, stride, padding, dilation)
        kept = F.conv1d(x, weight[..., first:end], None, stride, padding - first * dilation, dilation)
        torch.testing.assert_close(kept, y, rtol=1e-12, atol=1e-12)
    assert fewer > 300


@pytest.mark.parametrize(("extents", "taps", "padding", "left"), [
    ((1, 1), (3, 3), (1, 1), [(1, 2), (1, 2)]),
    ((2, 2), (7, 7), (3, 3), [(2, 5), (2, 5)]),
    ((1, 9), (3, 3), (1, 1), [(1, 2), (0, 3)]),
    ((1,), (3,), (1,), [(1, 2)]),
    ((2, 2), (3, 3), (1, 1), None),
    ((4, 4), (1, 1), (0, 0), None),
    ((3, 3), (3, 3), (0, 0), None),
])  # fmt: skip
def test_which_taps_are_left(extents, taps, padding, left) -> None:
    ones = (1,) * len(taps)
    found = within_reach(extents, taps, Geometry(ones, padding, ones, 1))
    assert (found and found.spans) == left


def test_far_taps_of_a_dilated_kernel_are_left_out() -> None:
    found = within_reach((10, 10), (3, 3), Geometry((1, 1), (12, 12), (12, 12), 1))
    assert found is not None
    assert found.spans == [(1, 2), (1, 2)]
    assert found.geometry.padding == (0, 0)


@st.composite
def calls(draw):
    """Arguments of the operator on a map that is small beside the kernel, all of them leaves."""
    dims, n, batch = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3])), draw(st.integers(1, 9))
    groups = draw(st.sampled_from([1, 2, 4]))
    axes = [draw(st.sampled_from(GEOMETRIES)) for _ in range(dims)]
    extents, taps, stride, padding, dilation = zip(*axes, strict=True)
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random).requires_grad_()

    operands = {
        "x": leaf(batch, 4, *extents),
        "weight": leaf(n, 8, 4 // groups, *taps),
        "kernel": leaf(batch, n),
        "spatial": leaf(batch, *taps),
        "channel": leaf(batch, 4),
        "filter": leaf(batch, 8),
        "bias": leaf(8),
    }
    return operands, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


@given(calls())
@settings(max_examples=100, deadline=None)
def test_the_operator_and_all_gradients_are_those_of_the_definition(call) -> None:
    operands, geometry = call
    found = []
    for backend in ("auto", "reference"):
        y = dynamic_conv(**operands, **geometry, backend=backend)
        grads = torch.autograd.grad(y.sin().sum(), [*operands.values()])
        found.append([y, *grads])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("extent", [1, 2])
def test_a_layer_computes_the_same_with_all_taps(dtype: torch.dtype, batch: int, extent: int) -> None:
    torch.manual_seed(0)
    drawn = odconv.ODConv2d(32, 48, 7, padding=3, kernel_num=4)
    x = torch.randn(batch, 32, extent, extent)

    def computed() -> list[torch.Tensor]:
        layer = copy.deepcopy(drawn)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = layer.train()(x)
            y.float().square().mean().backward()
            with torch.no_grad():
                z = layer.eval()(x)
        return [y.detach(), z, *(parameter.grad for parameter in layer.parameters())]

    with patch("odconv.ops.policy.within_reach", lambda *_: None):
        expected = computed()
    for ours, theirs in zip(computed(), expected, strict=True):
        scale = theirs.float().abs().max().item()
        tolerance = 1e-4 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=tolerance * scale)


def test_per_sample_kernels_and_those_of_cells() -> None:
    random = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random).requires_grad_()

    x, cells, shares, shape = leaf(3, 32, 1, 1), leaf(5, 16, 16, 1, 1), leaf(3, 9 * 2 * 2, 5), (32, 32, 3, 3)
    options = {"padding": 1}
    kernels = assemble(cells, shares, shape)
    expected = per_sample_conv(x, kernels, **options, backend="reference")
    ways = {
        "own kernels": per_sample_conv(x, kernels, **options),
        "mixed": mixed_conv(x, lambda c, s: assemble(c, s, shape), cells, shares, shape, **options),
        "cells": cell_conv(x, cells, shares, shape, **options),
    }
    leaves = [x, cells, shares]
    expected_grads = torch.autograd.grad(expected.sin().sum(), leaves, create_graph=True)
    expected_second = torch.autograd.grad(sum(g.sin().sum() for g in expected_grads), leaves, retain_graph=True)
    for way, y in ways.items():
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10, msg=way)
        grads = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves, retain_graph=True)
        for ours, theirs in zip((*grads, *second), (*expected_grads, *expected_second), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8, msg=way)


def test_compiled_and_exported() -> None:
    layer = odconv.ODConv2d(16, 24, 3, padding=1, kernel_num=2).eval()
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), layer)
    x = torch.randn(4, 16, 6, 6)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-5, atol=1e-5)


def test_the_explanation_says_so() -> None:
    layer = odconv.ODConv2d(32, 32, 3, padding=1)
    assert "(1, 1) taps meet more than padding" in str(odconv.explain(layer, (2, 32, 1, 1)))
    assert "taps meet" not in str(odconv.explain(layer, (2, 32, 8, 8)))
