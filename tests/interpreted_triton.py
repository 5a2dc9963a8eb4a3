"""The Triton form on the CPU, under Triton's interpreter; tests/test_triton.py runs this file in a process of its own.

The interpreter must be on before Triton is first imported: TRITON_INTERPRET=1 pytest tests/interpreted_triton.py
"""

import itertools

import pytest
import torch
from fake_gpu import FakeGpu, forget
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import ATTENTIONS, arguments, outcome

from odconv.functional import dynamic_conv, per_sample_conv
from odconv.ops import BACKENDS, triton

pytestmark = pytest.mark.skipif(not (triton.INTERPRETED and triton.INSTALLED), reason="Triton's interpreter is off")


@pytest.fixture(autouse=True)
def _form(monkeypatch):
    """The form among the backends, and NaN in fresh memory, so that what a kernel forgets to write is seen."""
    monkeypatch.setitem(BACKENDS, "triton", triton.triton_conv)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_is_the_reference(tensors, **geometry):
    pairs = zip(
        outcome(dynamic_conv, tensors, **geometry, backend="triton"),
        outcome(dynamic_conv, tensors, **geometry, backend="reference"),
        strict=True,
    )
    for value, wanted in pairs:
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dims", "groups"),
    [(1, 6), *(pytest.param(*row, marks=pytest.mark.slow) for row in [(1, 1), (1, 2), (2, 1), (2, 2), (2, 6)])],
)
def test_a_kernel_for_each_sample(groups, dims):
    torch.manual_seed(0)
    tensors = arguments(3, 6, 6, 3, (3,) * dims, (5,) * dims, groups, ("spatial", "channel", "filter"))
    pairs = []
    for name in ("triton", "reference"):
        y = per_sample_conv(**tensors, padding=1, stride=2, groups=groups, backend=name)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        pairs.append([y, *torch.autograd.grad(y, list(tensors.values()), upstream)])
    for value, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 2, 3]))
    channels, filters = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    n = draw(st.integers(1, 3))
    taps = draw(st.sampled_from([(1,), (3,), (1, 1), (2, 2), (3, 1), (1, 4)]))
    present = {name for name in ATTENTIONS if draw(st.booleans())} | ({"kernel"} if n > 1 else set())
    stride, dilation = (tuple(draw(st.integers(1, most)) for _ in taps) for most in (3, 2))
    padding = tuple(draw(st.integers(0, 2)) for _ in taps)
    size = tuple(d * (k - 1) + draw(st.integers(1, 5)) for d, k in zip(dilation, taps, strict=True))
    tensors = (draw(st.integers(1, 2)), channels, filters, n, taps, size, groups, sorted(present))
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


@settings(max_examples=2, deadline=None, derandomize=True)
@given(problem=problems(), seed=st.integers(0, 2**31))
def test_it_is_the_reference(problem, seed):
    torch.manual_seed(seed)
    shape, geometry = problem
    assert_is_the_reference(arguments(*shape), **geometry)


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        pytest.param((2, 70, 130, 2, (1, 1), (9, 8)), {}, marks=pytest.mark.slow),
        ((2, 66, 17, 1, (2, 1), (9, 8)), {}),
        ((1, 17, 131, 3, (1,), (133,)), {"stride": 2}),
        ((2, 34, 68, 2, (1, 1), (3, 3), 2), {"groups": 2}),
        ((2, 66, 66, 2, (2, 2), (3, 4), 66), {"groups": 66, "stride": 2, "padding": 1}),
    ],
    ids=["1x1", "odd", "1-d", "groups", "depth-wise"],
)
def test_more_than_one_block(shape, geometry):
    torch.manual_seed(0)
    assert_is_the_reference(arguments(*shape), **geometry)


SUBSETS = [subset for size in range(5) for subset in itertools.combinations(ATTENTIONS, size)]


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "present"), [(2, p) for p in SUBSETS] + [(4, p) for p in SUBSETS if "filter" in p])
def test_every_subset_of_the_attentions(groups, present):
    torch.manual_seed(0)
    n = 2 if "kernel" in present else 1
    assert_is_the_reference(arguments(2, 4, 4, n, (1, 2), (2, 3), groups, present), groups=groups)


@pytest.mark.slow
@pytest.mark.parametrize(
    (
        "dtype",
        "groups",
    ),  # dense bfloat16 is for benchmarks/gpu.py: the interpreter's product takes its bits for integers
    [(torch.float32, 1), (torch.float16, 1), (torch.float32, 8), (torch.float16, 8), (torch.bfloat16, 8)],
)
def test_low_precision_stays_near_float64(dtype, groups):
    torch.manual_seed(0)
    tensors = {
        name: tensor.detach().to(dtype).requires_grad_()
        for name, tensor in arguments(2, 8, 8, 4, (3, 3), (5, 5), groups).items()
    }
    exact = outcome(dynamic_conv,
        {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()},
        padding=1, groups=groups, backend="reference",
    )  # fmt: skip
    for value, wanted in zip(
        outcome(dynamic_conv, tensors, padding=1, groups=groups, backend="triton"), exact, strict=True
    ):
        assert value.dtype == dtype
        assert (value.double() - wanted).norm() / wanted.norm() < 3 * torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 6], ids=["dense", "depth-wise"])
@pytest.mark.parametrize(("samples", "programs"), [(2, 1), (4, 1024)])
def test_how_the_batch_is_cut_changes_only_the_rounding_of_the_sum_over_it(groups, samples, programs, monkeypatch):
    torch.manual_seed(0)
    tensors = arguments(5, 6, 6, 2, (1, 2), (3, 3), groups)
    whole = outcome(dynamic_conv, tensors, groups=groups, backend="triton")
    monkeypatch.setattr(triton, "WORKSPACE", samples * tensors["weight"][0].numel() * 8)
    monkeypatch.setattr("odconv.ops.triton.launch.PROGRAMS", programs)
    cut = outcome(dynamic_conv, tensors, groups=groups, backend="triton")
    for name, value, wanted in zip(("y", *tensors), cut, whole, strict=True):
        if name == "weight":
            torch.testing.assert_close(value, wanted, rtol=1e-13, atol=1e-13)
        else:
            assert value.equal(wanted), name


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    tensors = arguments(3, 6, 5, 2, (2, 2), (4, 4), dtype=torch.float16)
    for value, wanted in zip(
        outcome(dynamic_conv, tensors, backend="triton"), outcome(dynamic_conv, tensors, backend="triton"), strict=True
    ):
        assert value.equal(wanted)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    tensors = arguments(batch, 4, 6, 2, (1, 3), (2, 3))
    y = dynamic_conv(**tensors, padding=(0, 1), backend="triton")
    assert y.shape == (batch, 6, 2, 3)
    y.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in tensors.values())
    assert batch or tensors["weight"].grad.count_nonzero() == 0


def test_memory_formats_give_the_same_and_the_output_is_channels_last():
    torch.manual_seed(0)
    tensors = arguments(2, 4, 6, 2, (2, 2), (2, 3))
    expected = dynamic_conv(**tensors, padding=1, backend="triton")
    assert expected.is_contiguous(memory_format=torch.channels_last)
    x = tensors.pop("x").detach()
    for same in (x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert dynamic_conv(same, **tensors, padding=1, backend="triton").equal(expected)


@pytest.mark.parametrize("wanted", ["x", "weight", "channel"])
def test_gradients_of_one_input_alone(wanted):
    torch.manual_seed(0)
    tensors = {
        name: tensor.requires_grad_(name == wanted) for name, tensor in arguments(2, 4, 6, 2, (2, 2), (3, 3)).items()
    }
    found, expected = (
        torch.autograd.grad(dynamic_conv(**tensors, backend=form).square().sum(), tensors[wanted])[0]
        for form in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)


def operands(batch, groups, requires_grad):
    present = ATTENTIONS[:3] if groups > 1 else ATTENTIONS
    tensors = arguments(batch, 4, 4, 2, (1, 2), (4, 3), groups, present, dtype=torch.float32)
    tensors = {name: tensor.detach().requires_grad_(requires_grad) for name, tensor in tensors.items()}
    return (*(tensors.get(name) for name in ("x", "weight", *ATTENTIONS)), [2, 1], [1, 0], [1, 1], groups)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "groups"), [(2, 1), (1, 4)], ids=["dense", "depth-wise of one sample"])
def test_the_operators_keep_their_promises_to_the_compiler(batch, groups):
    torch.manual_seed(0)
    torch.library.opcheck(triton.conv, operands(batch, groups, requires_grad=True))
    inputs = operands(batch, groups, requires_grad=False)
    grad = torch.randn_like(triton.conv(*inputs))
    torch.library.opcheck(
        triton.conv_backward, (grad, *inputs, [True] * (6 if groups == 1 else 5) + [False] * (groups > 1))
    )
    torch.library.opcheck(triton.conv_backward, (grad, *inputs, [False, True, False, True, False, False]))


@pytest.mark.slow
def test_torch_compile_takes_the_whole_operator():
    torch.manual_seed(0)
    tensors = arguments(2, 4, 6, 2, (2, 2), (3, 3))
    compiled = torch.compile(dynamic_conv, fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(conv(**tensors, padding=1, backend="triton").square().sum(), list(tensors.values()))
        for conv in (compiled, dynamic_conv)
    )
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_torch_export_with_any_batch():
    class Layer(torch.nn.Module):
        def forward(self, x, weight, kernel):
            return dynamic_conv(x, weight, kernel=kernel, backend="triton")

    torch.manual_seed(0)
    tensors = {name: t.detach() for name, t in arguments(2, 4, 6, 2, (2, 2), (3, 3), present=("kernel",)).items()}
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        Layer(), tuple(tensors.values()), dynamic_shapes={"x": {0: batch}, "weight": None, "kernel": {0: batch}}
    )
    for size in (1, 3):
        x, kernel = torch.randn(size, 4, 3, 3, dtype=torch.float64), torch.rand(size, 2, dtype=torch.float64)
        expected = dynamic_conv(x, tensors["weight"], kernel=kernel, backend="reference")
        torch.testing.assert_close(program.module()(x, tensors["weight"], kernel), expected)


@pytest.mark.parametrize("groups", [1, 4], ids=["dense", "depth-wise"])
def test_second_derivatives_are_those_of_the_reference(groups):
    torch.manual_seed(0)
    tensors = arguments(2, 4, 4, 2, (2, 2), (3, 3), groups)
    inputs = list(tensors.values())
    second = []
    for form in ("triton", "reference"):
        y = dynamic_conv(**tensors, groups=groups, padding=1, backend=form)
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        second.append([*first, *torch.autograd.grad(sum(d.square().sum() for d in first), inputs)])
    for value, wanted in zip(*second, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


def test_what_has_no_kernel_is_refused():
    x, weight = torch.zeros(1, 2, 3, 3, 3), torch.zeros(1, 2, 2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"backend 'triton' needs a 1-d or 2-d map, got x of shape \(1, 2, 3, 3, 3\)"):
        dynamic_conv(x, weight, backend="triton")
    x, weight = torch.zeros(1, 2, 3, 3, dtype=torch.complex64), torch.zeros(1, 2, 2, 1, 1, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"backend 'triton' needs x in one of .*, got torch.complex64"):
        dynamic_conv(x, weight, backend="triton")


@pytest.fixture
def gpu(_form, monkeypatch, tmp_path):
    """The CPU in the place of a GPU on which Triton is the fastest."""
    torch.use_deterministic_algorithms(False)  # which measures nothing
    gpu = FakeGpu(monkeypatch, tmp_path)
    gpu.costs["triton"] = 0.1
    yield gpu
    forget()


def tuned_call(batch, groups=1, training=True):
    torch.manual_seed(0)
    tensors = arguments(batch, 4, 4, 2, (2, 2), (3, 4), groups, dtype=torch.float32)
    tensors["x"] = tensors["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.set_grad_enabled(training):
        found = dynamic_conv(**tensors, padding=1, groups=groups)
    torch.testing.assert_close(found, dynamic_conv(**tensors, padding=1, groups=groups, backend="reference"))
    return found, tensors


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("groups", [1, 4], ids=["dense", "depth-wise"])
def test_the_tuner_takes_it_where_it_is_right(groups, training, gpu):
    found, tensors = tuned_call(2, groups, training)
    assert gpu.runs[-1] == "triton"
    (known,) = gpu.memory.found.values()
    assert known.choice.backend == "triton"
    if training:  # and gives second derivatives as any other backend does
        inputs = list(tensors.values())
        first = torch.autograd.grad(found.square().sum(), inputs, create_graph=True)
        assert all(d.isfinite().all() for d in torch.autograd.grad(sum(d.square().sum() for d in first), inputs))


def wrong(run):
    def convolve(x, mixed, y, *rest, **options):
        run(x, mixed, y, *rest, **options)
        y.select(2, 0).zero_()

    return convolve


def raising(run):
    def convolve(*_, **__):
        raise RuntimeError("PTX was generated with version 9.9, which is unsupported")

    return convolve


@pytest.mark.parametrize(
    ("fault", "message"), [(wrong, "differs from plain PyTorch"), (raising, "raises RuntimeError: PTX was")]
)
def test_the_tuner_names_what_is_wrong_once_and_never_takes_it(fault, message, gpu, monkeypatch):
    from odconv.ops.triton import launch

    monkeypatch.setattr(launch, "convolve", fault(launch.convolve))
    with pytest.warns(UserWarning, match=f"backend 'triton' {message}") as caught:
        tuned_call(2)
    tuned_call(3)
    assert len(caught) == 1
    assert [known.choice.backend for known in gpu.memory.found.values()] == ["product"] * 2
    gpu.restart()
    tuned_call(2)
    assert "triton" not in gpu.runs
