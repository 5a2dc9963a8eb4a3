"""The core of conversion: which convolutions are replaced, and what they keep."""

import torch
from torch import nn

import odconv
from odconv.convert import dynamic_like, replace_convolutions


def network():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect", bias=False, dtype=torch.float64),
        nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())}),
        nn.ConvTranspose2d(4, 4, 2),
        nn.Conv1d(4, 6, 5, stride=2, dilation=2, groups=2),
    ).eval()


def test_chosen_convolutions_are_replaced_with_their_geometry():
    model = network()
    to = {1: odconv.ODConv1d, 2: odconv.ODConv2d}
    names = replace_convolutions(
        model, lambda conv: dynamic_like(conv, to[len(conv.kernel_size)], kernel_num=2), lambda name, conv: True
    )
    assert names == ["0", "1.a", "1.b.0", "3"]
    first, last = model[0], model[3]
    assert (first.padding, first.padding_mode, first.bias, first.weight.dtype) == (
        "same",
        "reflect",
        None,
        torch.float64,
    )
    assert (last.stride, last.dilation, last.groups, last.bias.shape) == ((2,), (2,), 2, (6,))
    assert model[1]["a"] is model[1]["b"][0]
    assert isinstance(model[2], nn.ConvTranspose2d)
    assert not any(module.training for module in model.modules())


def test_converting_again_changes_nothing_and_the_predicate_decides():
    model = network()
    make = lambda conv: dynamic_like(conv, odconv.DyConv2d)  # noqa: E731
    assert replace_convolutions(model, make, lambda name, conv: name.startswith("1.")) == ["1.a", "1.b.0"]
    before = list(model.modules())
    assert replace_convolutions(model, make, lambda name, conv: name.startswith("1.")) == []
    assert list(model.modules()) == before
