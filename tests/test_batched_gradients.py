"""Gradients of several upstream ones at once: what vectorised Jacobians and Hessians of torch.autograd take."""

import pytest
import torch
from torch import nn

import odconv

LAYERS = {
    "dense": lambda: odconv.ODConv2d(16, 24, 3, padding=1),
    "dense, bias": lambda: odconv.ODConv2d(16, 24, 3, padding=1, bias=True),
    "one kernel": lambda: odconv.ODConv2d(16, 24, 3, padding=1, kernel_num=1, attentions=("channel", "filter")),
    "mixed bias": lambda: odconv.DyConv2d(16, 24, 3, padding=1, bias=True),
    "one tap": lambda: odconv.CondConv2d(16, 24, 1, bias=True),
    "one tap, strided": lambda: odconv.CondConv2d(16, 24, 1, stride=2),
    "depth-wise": lambda: odconv.ODConv2d(16, 16, 3, padding=1, groups=16),
    "depth-wise, one kernel": lambda: odconv.ODConv2d(16, 16, 3, padding=1, groups=16, kernel_num=1),
    "grouped": lambda: odconv.ODConv2d(16, 24, 3, padding=1, groups=4),
    "transposed": lambda: odconv.ODConvTranspose2d(16, 24, 3, bias=True),
    "cells": lambda: cells(nn.Conv2d(16, 24, 3, padding=1)),
    "cells, depth-wise": lambda: cells(nn.Conv2d(16, 16, 3, padding=1, groups=16)),
}


def cells(conv: nn.Module) -> nn.Module:
    return odconv.convert(nn.Sequential(conv), "kernelwarehouse", include="*", warm_start=False)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [4, 12])
@pytest.mark.parametrize("name", LAYERS)
def test_batched_gradients_are_those_one_by_one(name, size, dtype, last):
    torch.manual_seed(0)
    layer = LAYERS[name]().eval().to(dtype)
    x = torch.randn(2, 16, size, size).to(dtype)
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    y, wanted = layer(x), [x, *layer.parameters()]
    upstream = torch.randn(3, *y.shape).to(dtype)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    together = torch.autograd.grad(y, wanted, upstream, is_grads_batched=True, retain_graph=True)
    for index, one in enumerate(upstream):
        found = torch.autograd.grad(y, wanted, one, retain_graph=True)
        for many, single in zip(together, found, strict=True):
            assert (many[index] - single).norm() <= tolerance * single.norm()
