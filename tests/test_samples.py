"""The compiled form for maps of few positions, whose vectors run over samples."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from operands import ATTENTIONS, arguments, assert_gradients_stand_alone, assert_laid_out_as_told, outcome
from torch.utils.flop_counter import FlopCounterMode

import odconv
from odconv.functional import dynamic_conv
from odconv.ops import cpu
from odconv.ops.contract import Geometry
from odconv.ops.policy import choose
from odconv.ops.reach import count_pairs

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")


@st.composite
def problems(draw):
    dims = draw(st.sampled_from([1, 2, 3]))
    n = draw(st.sampled_from([1, 2, 3, 8]))
    sizes = draw(st.sampled_from([1, 3, 16, 17, 70])), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    taps = tuple(draw(st.integers(1, 4)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(dims))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, taps, padding, strict=True)]
    size = tuple(draw(st.integers(low, low + 2)) for low in least)
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    present = [name for name in ATTENTIONS if (name == "kernel" and n > 1) or draw(st.booleans())]
    bias = draw(st.sampled_from([None, "static", "mixed"] if "kernel" in present else [None, "static"]))
    layout = draw(st.sampled_from(["contiguous", "channels last", "batch last"]))
    return (
        (*sizes, n, taps, size, 1, present, bias),
        {"stride": stride, "padding": padding, "dilation": dilation},
        layout,
    )


def laid_out(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The same tensors, x in another order in memory."""
    axis = {"contiguous": None, "channels last": 1, "batch last": 0}[layout]
    if axis is None:
        return tensors
    x = tensors["x"].detach().movedim(axis, -1).contiguous().movedim(-1, axis)
    return tensors | {"x": x.requires_grad_()}


@settings(max_examples=80, deadline=None)
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_it_is_the_reference_with_all_gradients(problem, seed):
    torch.manual_seed(seed)
    shape, geometry, layout = problem
    tensors = laid_out(arguments(*shape), layout)
    expected = outcome(dynamic_conv, tensors, **geometry, backend="reference")
    for found, wanted in zip(outcome(dynamic_conv, tensors, **geometry, backend="samples"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# Several blocks of channels and filters, several panels of samples, lanes left over in each.
LARGE = [
    (64, 130, 70, 4, (3, 3), (2, 2)),
    (70, 64, 256, 1, (3, 3), (4, 4)),
    (130, 33, 100, 2, (3,), (5,)),
    (9, 600, 24, 8, (1, 1), (1, 1)),
]


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_problems_are_the_reference(shape, dtype):
    torch.manual_seed(0)
    tensors = arguments(*shape)
    padding = tuple(k // 2 for k in shape[4])
    expected = outcome(dynamic_conv, tensors, padding=padding, backend="reference")
    given = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    for found, wanted in zip(outcome(dynamic_conv, given, padding=padding, backend="samples"), expected, strict=True):
        summed = max(tensors["weight"][:, 0].numel(), tensors["weight"][0, :, 0].numel(), shape[0])
        assert (found - wanted).norm() <= summed**0.5 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("present", [["channel", "filter"], ["spatial"], ATTENTIONS])
def test_a_gradient_does_not_depend_on_which_others_are_wanted(present):
    torch.manual_seed(0)
    tensors = arguments(3, 6, 4, 2 if "kernel" in present else 1, (3, 2), (3, 2), 1, present, "static")
    assert_gradients_stand_alone(dynamic_conv, tensors, padding=1, stride=(2, 1), backend="samples")


def test_second_derivatives():
    torch.manual_seed(0)
    tensors = arguments(2, 2, 2, 2, (2, 2), (2, 2), bias="mixed")

    def run(*values):
        return dynamic_conv(**dict(zip(tensors, values, strict=True)), padding=1, backend="samples")

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tuple(tensors.values()), fast_mode=True)


def test_one_training_step_does_not_depend_on_threads():
    torch.manual_seed(0)
    tensors = arguments(64, 40, 48, 2, (3, 3), (2, 2), dtype=torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outcome(dynamic_conv, tensors, padding=1, backend="samples"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


def operands(**changes):
    """Arguments of the operator."""
    weight = torch.ones(3, 6, 4, 3, 3)
    given = {"x": torch.ones(2, 4, 2, 2), "weight": weight, "shares": torch.ones(2, 3, 9), "stride": [1, 1]}
    return [*(given | {"padding": [1, 1], "dilation": [1, 1]} | changes).values()]


WRONG = {
    "an empty batch": {"x": torch.ones(0, 4, 2, 2), "shares": torch.ones(0, 3, 9)},
    "an empty map": {"x": torch.ones(2, 4, 0, 2)},
    "other channels": {"x": torch.ones(2, 3, 2, 2)},
    "no space": {"x": torch.ones(2, 4)},
    "halves": {
        "x": torch.ones(2, 4, 2, 2).half(),
        "weight": torch.ones(3, 6, 4, 3, 3).half(),
        "shares": torch.ones(2, 3, 9).half(),
    },
    "integers": {"x": torch.ones(2, 4, 2, 2, dtype=torch.int64)},
    "a weight of other axes": {"weight": torch.ones(3, 6, 4, 3)},
    "an empty weight": {"weight": torch.ones(0, 6, 4, 3, 3), "shares": torch.ones(2, 0, 9)},
    "a strided weight": {"weight": torch.ones(3, 6, 4, 3, 6)[..., ::2]},
    "a share too few": {"shares": torch.ones(2, 2, 9)},
    "a tap too many": {"shares": torch.ones(2, 3, 10)},
    "shares of another batch": {"shares": torch.ones(3, 3, 9)},
    "shares of doubles": {"shares": torch.ones(2, 3, 9).double()},
    "strided shares": {"shares": torch.ones(2, 9, 3).mT},
    "shares without taps": {"shares": torch.ones(2, 3)},
    "no stride": {"stride": []},
    "stride 0": {"stride": [0, 1]},
    "huge padding": {"padding": [2**62, 1]},
    "a reach beyond the map": {"dilation": [5, 1]},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_operators_refuse_what_does_not_fit(changes):
    with pytest.raises(RuntimeError, match="odconv: "):
        torch.ops.odconv.conv_samples(*operands(**changes))
    with pytest.raises(RuntimeError, match="odconv: "):
        torch.ops.odconv.conv_samples_backward(torch.ones(2, 6, 2, 2), *operands(**changes), True, True)
    with pytest.raises(RuntimeError, match="odconv: grad must be"):
        torch.ops.odconv.conv_samples_backward(torch.ones(2, 5, 2, 2), *operands(), True, True)


def test_operators_are_registered_as_operators_should_be():
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    shares = torch.rand(3, 2, 9, dtype=torch.float64, requires_grad=True)
    geometry = ([2, 1], [1, 1], [1, 1])
    torch.library.opcheck(torch.ops.odconv.conv_samples.default, (x, weight, shares, *geometry))
    plain = [tensor.detach() for tensor in (x, weight, shares)]
    grad = torch.ops.odconv.conv_samples(*plain, *geometry).clone()
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.odconv.conv_samples_backward.default, (grad, *plain, *geometry, *wanted))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "batch last"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_operators_lay_out_what_they_return_as_torch_compile_is_told(axes, layout):
    x = laid_out({"x": torch.randn(4, 8, *[2] * axes)}, layout)["x"].detach()
    weight, shares, geometry = torch.randn(2, 8, 8, *[3] * axes), torch.rand(4, 2, 3**axes), ([1] * axes,) * 3
    y = torch.ops.odconv.conv_samples(x, weight, shares, *geometry)
    calls = {
        torch.ops.odconv.conv_samples: (x, weight, shares, *geometry),
        torch.ops.odconv.conv_samples_backward: (torch.randn_like(y), x, weight, shares, *geometry, True, True),
    }
    for operator, inputs in calls.items():
        assert_laid_out_as_told(operator, inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_on_small_images_trains_the_same(compiled, monkeypatch):
    torch.manual_seed(0)
    drawn = torch.nn.Sequential(
        odconv.ODConv2d(16, 24, 3, padding=1, stride=2),
        torch.nn.BatchNorm2d(24),
        odconv.ODConv2d(24, 24, 3, padding=1, kernel_num=1),
    )
    x = torch.randn(64, 16, 4, 4)

    def step() -> list[torch.Tensor]:
        model = copy.deepcopy(drawn)
        y = (torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model)(x)
        y.square().mean().backward()
        return [y.detach(), *(parameter.grad for parameter in model.parameters())]

    assert choose(x, drawn[0].weight, Geometry((2, 2), (1, 1), (1, 1), 1), True).backend == "samples"
    found = step()
    monkeypatch.setattr("odconv.ops.policy.is_better_by_samples", lambda *_: False)
    torch._dynamo.reset()
    for ours, theirs in zip(found, step(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("x", "changes", "expected"),
    [
        ((64, 32, 2, 2), {}, "samples"),
        ((64, 32, 2, 2), {"differentiated": False}, "samples"),
        ((8, 32, 2, 2), {}, "samples"),
        ((8, 32, 2, 2), {"differentiated": False}, "cpu"),
        ((7, 32, 2, 2), {}, "cpu"),
        ((64, 32, 4, 4), {}, "cpu"),  # four kernels
        ((64, 32, 4, 4), {"n": 1}, "samples"),
        ((64, 32, 5, 5), {"n": 1}, "samples"),
        ((64, 32, 6, 6), {"n": 1}, "cpu"),
        ((64, 32, 1, 1), {"taps": 1}, "samples"),
        ((64, 32, 2, 2), {"taps": 1}, "cpu"),
        ((64, 32, 2, 2), {"groups": 2}, "cpu"),
        ((64, 32, 2, 2), {"per_sample": True}, "cpu"),
    ],
)
def test_it_is_chosen_for_few_positions_and_many_samples(x, changes, expected):
    chosen = {"n": 4, "taps": 3, "groups": 1, "differentiated": True, "per_sample": False} | changes
    groups, taps = chosen["groups"], chosen["taps"]
    count = x[0] if chosen["per_sample"] else chosen["n"]
    weight = torch.empty(count, 32, 32 // groups, taps, taps)
    geometry = Geometry((1, 1), (taps // 2,) * 2, (1, 1), groups)
    choice = choose(torch.empty(x), weight, geometry, chosen["differentiated"], chosen["per_sample"])
    assert choice.backend == expected


def test_the_named_form_is_strict():
    tensors = arguments(2, 4, 4, 2, (3, 3), (2, 2), 2)
    with pytest.raises(ValueError, match=r"backend 'samples' needs x on the CPU in float32 or float64.* and groups 2"):
        dynamic_conv(**tensors, padding=1, groups=2, backend="samples")
    halves = {name: tensor.bfloat16() for name, tensor in arguments(2, 4, 4, 2, (3, 3), (2, 2)).items()}
    with pytest.raises(ValueError, match=r"backend 'samples' needs.* in torch.bfloat16"):
        dynamic_conv(**halves, padding=1, backend="samples")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        odconv.functional.per_sample_conv(
            torch.ones(2, 4, 2, 2), torch.ones(2, 4, 4, 3, 3), padding=1, backend="samples"
        )


def test_pairs_are_those_that_meet_the_map():
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        extent, taps, stride, padding, dilation = (
            int(torch.randint(low, 6, (), generator=random)) for low in (1, 1, 1, 0, 1)
        )
        if extent + 2 * padding < dilation * (taps - 1) + 1:
            continue
        geometry = Geometry((stride,), (padding,), (dilation,), 1)
        meets = torch.nn.functional.conv1d(torch.ones(1, 1, extent), torch.ones(1, 1, taps), None, *geometry)
        assert count_pairs((extent,), (taps,), geometry) == meets.sum().item()


def test_products_are_counted():
    tensors = arguments(16, 4, 6, 2, (3, 3), (2, 2), dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        y = dynamic_conv(**tensors, padding=1, backend="samples")
    assert counter.get_total_flops() == 2 * 16 * 16 * 2 * 4 * (6 + 1)  # samples, pairs, kernels, channels, filters
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 16 * 16 * 2 * (4 * (6 + 2) + 6 * (4 + 1))
