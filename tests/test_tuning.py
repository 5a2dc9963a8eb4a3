"""CUDA chooses by measuring: on the CPU in its place, by a clock that says how long each backend takes."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu, forget
from operands import arguments, outcome
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import odconv
from odconv.functional import dynamic_conv, per_sample_conv
from odconv.ops import BACKENDS, cpu, triton, tuning
from odconv.ops.eager import grouped
from odconv.ops.tuning import cuda, memory, trial

pytestmark = pytest.mark.filterwarnings("error:.*(odconv|backend|tuned)")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    yield FakeGpu(monkeypatch, tmp_path / "cache")
    forget()


def problem(batch=2, size=(5, 5), dtype=torch.float32, **options):
    """A call of the operator with a large map, for which the policy chooses groups."""
    torch.manual_seed(0)
    return arguments(batch, 4, 6, 2, (3,) * len(size), size, dtype=dtype, **options)


def call(tensors=None, training=False, **options):
    with torch.set_grad_enabled(training):
        return dynamic_conv(**(tensors or problem()), padding=1, **options)


def test_the_fastest_is_remembered_and_not_measured_again(gpu):
    tensors = problem()
    found = call(tensors)
    assert gpu.timings > 0
    assert {*gpu.runs} == {"shared", "product", "grouped"}
    assert gpu.runs[-1] == "product"
    torch.testing.assert_close(found, call(tensors, backend="reference"))
    gpu.runs, gpu.timings = [], 0
    call(tensors)
    assert (gpu.runs, gpu.timings) == (["product"], 0)
    (known,) = gpu.memory.found.values()
    assert known.choice == ("product", "measured on Fake GPU: product 1.000 ms, grouped 2.000 ms, shared 3.000 ms")


def test_what_is_hopeless_is_timed_once_and_the_time_is_bounded(gpu):
    gpu.costs |= {"product": 1.0, "grouped": 1.5, "shared": 2.5}
    call()
    rounds = math.ceil((trial.BUDGET - 2.5) / 2.5)
    assert gpu.runs == ["grouped", "shared", "product"] * 2 + ["grouped", "product"] * (rounds - 1) + ["product"]
    gpu.costs |= dict.fromkeys(gpu.costs, 0.001)
    gpu.timings = 0
    call(problem(batch=3))
    assert gpu.timings == 3 * trial.ROUNDS
    gpu.costs |= dict.fromkeys(gpu.costs, 1000.0)
    gpu.timings = 0
    call(problem(batch=9))
    assert gpu.timings == 3


def test_what_is_hardly_faster_does_not_take_the_place_of_the_policys_choice(gpu):
    gpu.costs |= {"product": 1.96, "grouped": 2.0}
    call()
    assert gpu.runs[-1] == "grouped"
    gpu.costs |= {"product": 1.88}
    call(problem(batch=3))
    assert gpu.runs[-1] == "product"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"batch": 5}, {"batch": 8}, True),
        ({"batch": 8}, {"batch": 9}, False),
        ({"batch": 1}, {"batch": 2}, False),
        ({"batch": 2}, {"batch": 3}, False),
        ({"size": (5, 5)}, {"size": (8, 6)}, True),
        ({"size": (8, 8)}, {"size": (8, 9)}, False),
        ({"size": (5, 5)}, {"size": (5,)}, False),
        ({}, {"present": ("kernel",)}, False),
        ({}, {"dtype": torch.float64}, False),
        ({}, {"groups": 2}, False),
    ],
)
def test_which_calls_are_one_problem(one, other, same, gpu):
    for options in (one, other):
        gpu.timings = 0
        call(problem(**options), groups=options.get("groups", 1))
    assert (gpu.timings == 0) == same
    assert len(gpu.memory.found) == 2 - same


def test_gradients_geometry_format_and_kernels_count(gpu):
    tensors = problem()
    call(tensors)
    call(tensors, training=True)
    call(tensors, stride=2)
    call(tensors, dilation=2)
    call(tensors | {"x": tensors["x"].detach().contiguous(memory_format=torch.channels_last)})
    call(tensors | {"x": tensors["x"].detach().transpose(2, 3)})
    with torch.no_grad():
        per_sample_conv(tensors["x"], torch.randn(2, 6, 4, 3, 3), padding=1)
    assert len(gpu.memory.found) == 7
    assert "shared" not in list(gpu.memory.found.values())[-1].milliseconds


def test_with_gradients_both_passes_are_timed(gpu):
    tensors = problem()
    found = outcome(dynamic_conv, tensors, padding=1)
    (known,) = gpu.memory.found.values()
    assert known.milliseconds == {"shared": 6, "product": 2, "grouped": 4}  # each mixes again in the backward pass
    for value, wanted in zip(found, outcome(dynamic_conv, tensors, padding=1, backend="reference"), strict=True):
        torch.testing.assert_close(value, wanted)


def test_a_batch_of_one_may_take_the_ordinary_convolution(gpu):
    gpu.costs["single"] = 0.5
    call(problem(batch=1))
    assert gpu.runs[-1] == "single"
    call(problem(batch=2))
    assert gpu.runs[-1] == "product"


def test_the_least_recently_met_is_forgotten(gpu, monkeypatch):
    monkeypatch.setattr(memory, "REMEMBERED", 2)
    first, second, third = (problem(batch=batch) for batch in (1, 2, 3))
    for tensors in (first, second, first, third):
        call(tensors)
    gpu.timings = 0
    call(first)
    call(third)
    assert gpu.timings == 0
    assert len(json.loads(gpu.file.read_text())["choices"]) == 2
    call(second)
    assert gpu.timings > 0


def test_what_a_process_chose_the_next_one_knows(gpu):
    call()
    gpu.restart()
    call()
    assert (gpu.runs, gpu.timings) == (["product"], 0)
    assert gpu.file.stat().st_mode & 0o111 == 0
    assert not [*gpu.folder.glob("*.partial")]


@pytest.mark.parametrize("name", ["odconv", "torch", "triton"])
def test_of_another_version_nothing_is_known(name, gpu, monkeypatch):
    call()
    gpu.restart()
    other = memory.versions() | {name: "99.0"}
    monkeypatch.setattr(memory, "versions", lambda: other)
    call()
    assert gpu.timings > 0
    assert len([*gpu.folder.glob("tuned-*.json")]) == 2


def test_versions_are_those_of_what_runs():
    versions = memory.versions()
    assert versions["odconv"] == odconv.__version__
    assert versions["torch"] == torch.__version__
    assert (versions["triton"] == "none") == (not triton.INSTALLED)


def with_choice(**changes):
    return lambda file: {
        "environment": file["environment"],
        "choices": {name: choice | changes for name, choice in file["choices"].items()},
    }


DAMAGED = {
    "a backend that is none": with_choice(backend="os.system"),
    "the reference": with_choice(backend="reference", milliseconds={"reference": 1.0}),
    "no time of the backend": with_choice(backend="single"),
    "a time that is none": with_choice(milliseconds={"product": "1"}),
    "not a number": with_choice(milliseconds={"product": math.nan}),
    "for ever": with_choice(milliseconds={"product": math.inf}),
    "less than nothing": with_choice(milliseconds={"product": -1.0}),
    "a list for a name": with_choice(backend=["product"]),
    "more in a choice": with_choice(run="me"),
    "more in the file": lambda file: file | {"version": 2},
    "no choices": lambda file: file | {"choices": []},
    "too many": lambda file: file | {"choices": {str(i): next(iter(file["choices"].values())) for i in range(2000)}},
    "another device's": lambda file: file | {"environment": file["environment"] | {"device": "Other"}},
    "a list": lambda file: [file],
}
BYTES = {
    "torn": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "no text": lambda text: b"\xff\xfe\x00" + text,
    "deep": lambda text: b"[" * 100_000,
    "long number": lambda text: b"9" * 10_000,
    "large": lambda text: text + b" " * memory.LARGEST,
}


@pytest.mark.parametrize("damage", [*DAMAGED, *BYTES])
def test_a_damaged_file_is_ignored_with_one_warning_and_written_anew(damage, gpu):
    call()
    sound = gpu.file.read_bytes()
    if damage in BYTES:
        gpu.file.write_bytes(BYTES[damage](sound))
    else:
        gpu.file.write_text(json.dumps(DAMAGED[damage](json.loads(sound))))
    gpu.restart()
    with pytest.warns(UserWarning, match=r"tuned-\w+\.json in odconv's cache folder is ignored") as caught:
        call()
    assert len(caught) == 1
    call(problem(batch=4))
    assert gpu.timings > 0
    assert len(json.loads(gpu.file.read_text())["choices"]) == 2
    gpu.restart()
    call()
    assert gpu.timings == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_waited_at(gpu):
    call()
    path = gpu.file
    path.unlink()
    os.mkfifo(path)
    gpu.restart()
    with pytest.warns(UserWarning, match="it is no regular file"):
        call()
    assert path.is_file()


def test_a_choice_that_cannot_compute_the_call_is_measured_again(gpu):
    call()
    content = json.loads(gpu.file.read_text())
    (choice,) = content["choices"].values()
    choice |= {"backend": "single", "milliseconds": {"single": 0.1}}
    gpu.file.write_text(json.dumps(content))
    gpu.restart()
    call()
    assert gpu.runs[-1] == "product"


def test_a_folder_that_cannot_be_written_costs_one_warning(gpu):
    gpu.folder.write_text("a file")
    with pytest.warns(UserWarning, match="are not kept") as caught:
        call()
    assert ["are not kept" in str(warning.message) for warning in caught].count(True) == 1
    call(problem(batch=3))
    gpu.runs, gpu.timings = [], 0
    call()
    assert (gpu.runs, gpu.timings) == (["product"], 0)


def test_without_a_home_and_without_locks_it_works(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    call()
    assert gpu.file.exists()
    gpu.restart()

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(memory, "cache_folder", homeless)
    with pytest.warns(UserWarning, match="Could not determine home directory"):
        call()
    assert gpu.runs[-1] == "product"


WRITER = """
import sys, torch
from odconv.ops.tuning import cuda
from odconv.ops.tuning.memory import measured, memory_of

cuda.name_device = lambda device: ("Fake GPU", "9.0")
memory = memory_of(torch.device("cpu"))
for number in range(15):
    memory.remember(f"{sys.argv[1]} {number}", measured("product", {"product": 1.0}, "Fake GPU"))
    assert f"{sys.argv[1]} {number}" in memory.read()
"""


def test_processes_that_write_at_once_lose_nothing(gpu):
    command = [sys.executable, "-W", "error", "-c", WRITER]
    writers = [subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE, text=True) for number in range(2)]
    for writer in writers:
        _, errors = writer.communicate(timeout=120)
        assert writer.returncode == 0, errors
    assert {*gpu.memory.found} == {f"{writer} {number}" for writer in range(2) for number in range(15)}


def test_it_can_be_switched_off(gpu, monkeypatch):
    call()
    monkeypatch.setenv("ODCONV_TUNE", "0")
    gpu.runs, gpu.timings = [], 0
    call()
    call(problem(batch=3))
    assert (gpu.runs, gpu.timings) == (["grouped", "grouped"], 0)


def test_runs_that_are_to_repeat_measure_nothing(gpu):
    torch.use_deterministic_algorithms(True)
    try:
        call()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (gpu.runs, gpu.timings) == (["grouped"], 0)


def test_while_a_graph_is_captured_a_remembered_choice_or_the_policys_is_taken(gpu, monkeypatch):
    call()
    monkeypatch.setattr(cuda, "is_capturing", lambda: True)
    gpu.runs, gpu.timings = [], 0
    call()
    call(problem(batch=3))
    assert (gpu.runs, gpu.timings) == (["product", "grouped"], 0)


def test_a_mode_that_sees_every_operation_sees_no_measuring(gpu):
    with FlopCounterMode(display=False) as counter:
        call()
    assert (gpu.runs, gpu.timings) == (["grouped"], 0)
    call()
    gpu.timings = 0
    with FlopCounterMode(display=False) as again:
        call()
    assert gpu.timings == 0
    assert again.get_total_flops() > 0
    assert counter.get_total_flops() > 0


def test_a_thread_that_measures_is_not_waited_for(gpu):
    with tuning._measuring:
        worker = threading.Thread(target=call)
        worker.start()
        worker.join(60)
        assert not worker.is_alive()
    assert (gpu.runs, gpu.timings) == (["grouped"], 0)


class Conv(nn.Module):
    def forward(self, x, weight, kernel):
        return dynamic_conv(x, weight, kernel=kernel, padding=1)


def plain(batch=2):
    return tuple(t.detach() for t in problem(batch, present=("kernel",)).values())


@pytest.mark.parametrize(
    "trace",
    [
        lambda: torch.compile(Conv(), fullgraph=True, backend="eager")(*plain()),
        lambda: torch.export.export(Conv(), plain()),
        lambda: torch.jit.trace(Conv(), plain(), check_trace=False),
        lambda: torch.func.vmap(Conv(), in_dims=(None, None, 0))(*plain()[:2], torch.rand(3, 2, 2)),
        lambda: torch.func.grad(lambda *given: Conv()(*given).sum())(*plain()),
        lambda: torch.func.jvp(partial(Conv(), *plain()[:2]), plain()[2:], plain()[2:]),
    ],
    ids=["compile", "export", "trace", "vmap", "grad", "jvp"],
)
def test_what_traces_or_transforms_measures_nothing(trace, gpu):
    trace()
    assert gpu.timings == 0
    assert not gpu.folder.exists()


def test_in_inference_mode_it_measures(gpu):
    with torch.inference_mode():
        call(problem())
        call(problem(batch=1))
    assert len(gpu.memory.found) == 2


def test_fake_tensors_are_not_measured(gpu):
    with FakeTensorMode() as mode:
        x, weight, kernel = map(mode.from_tensor, plain())
        assert Conv()(x, weight, kernel).shape == (2, 6, 5, 5)
    y = Conv()(x, weight, kernel)  # out of the mode, too
    assert y.shape == (2, 6, 5, 5)
    assert gpu.timings == 0


def test_compiled_graphs_neither_follow_what_is_remembered_nor_are_made_again_for_it(gpu):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    compiled = torch.compile(Conv(), fullgraph=True, backend=count)
    compiled(*plain())
    with torch.no_grad():
        Conv()(*plain())
        assert gpu.timings > 0
        eager = len(gpu.memory.found)
    compiled(*plain())
    assert len(graphs) == 1
    assert len(gpu.memory.found) == eager == 1


def out_of_memory(*_):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_a_backend_that_lacks_memory_is_left_out_quietly(gpu):
    gpu.replace("product", out_of_memory)
    call()
    assert gpu.runs[-1] == "grouped"
    (known,) = gpu.memory.found.values()
    assert {*known.milliseconds} == {"grouped", "shared"}


def test_where_the_policys_choice_lacks_memory_another_is_taken(gpu):
    gpu.replace("grouped", out_of_memory)
    call()
    assert gpu.runs[-1] == "product"


def test_where_every_backend_lacks_memory_the_caller_hears_of_it(gpu):
    for name in ("shared", "product", "grouped"):
        gpu.replace(name, out_of_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call()
    assert not gpu.memory.found


def test_where_there_is_no_memory_to_compare_the_policys_choice_is_taken(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "tells", out_of_memory)
    call()
    assert (gpu.runs, gpu.timings) == (["grouped", "grouped"], 0)
    assert not tuning._measuring.locked()


def test_a_backend_that_lacks_memory_while_it_is_timed_is_left_out(gpu):
    before = BACKENDS["product"]

    def later(*arguments):
        return out_of_memory() if gpu.timings else before(*arguments)

    gpu.replace("product", later)
    call()
    assert gpu.runs[-1] == "grouped"


def test_the_callers_gradients_hooks_and_random_numbers_stay_as_they_are(gpu):
    seen, saved = [], []
    tensors = problem()
    x = (tensors["x"].detach() * 1).requires_grad_()
    x.register_hook(seen.append)
    tensors["weight"].register_post_accumulate_grad_hook(seen.append)
    state = torch.get_rng_state()

    def step():
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(None), t)[1], lambda t: t):
            return call(tensors | {"x": x}, training=True)

    y = step()
    assert gpu.timings > 0
    first = len(saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert not seen
    assert all(t.grad is None for t in (x, *tensors.values()))
    gpu.timings = 0
    step()
    assert gpu.timings == 0
    assert len(saved) == first
    y.sum().backward()
    assert len(seen) == 2


def test_checkpointed_layers_save_the_same_again(gpu):
    layer = odconv.ODConv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert gpu.timings > 0
    assert layer.weight.grad.isfinite().all()


def test_an_input_that_does_not_tell_is_measured_later(gpu):
    tensors = problem()
    zeros = tensors | {"x": torch.zeros(2, 4, 5, 5)}
    call(zeros)
    call(zeros | {"x": torch.full((2, 4, 5, 5), math.nan)})
    assert (gpu.timings, len(gpu.memory.found)) == (0, 0)
    call(tensors)
    assert gpu.timings > 0


def test_an_empty_batch_and_other_dtypes_are_the_policys(gpu):
    assert call(problem(batch=0)).shape[0] == 0
    assert gpu.timings == 0
    x, weight, kernel = plain()
    found = Conv()(x.to(torch.complex64), weight.to(torch.complex64), kernel.to(torch.complex64))
    assert found.dtype == torch.complex64
    assert gpu.timings == 0


class TestTriton:
    """A backend of that name, for which any function stands in."""

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        monkeypatch.setattr(triton, "INSTALLED", True)
        monkeypatch.setattr(triton, "INTERPRETED", True)

    @staticmethod
    def last(batch=2):
        tensors = problem(batch)
        return tensors | {"x": tensors["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()}

    def test_it_is_taken_where_it_is_right_and_the_fastest(self, gpu):
        gpu.replace("triton", grouped)
        call(self.last())
        assert gpu.runs[-1] == "product"
        gpu.costs["triton"] = 0.5
        for training in (False, True):
            call(self.last(batch=3), training=training)
            assert gpu.runs[-1] == "triton"

    def test_on_other_maps_than_channels_last_it_is_none_of_the_candidates(self, gpu):
        gpu.costs["triton"] = 0.5
        call(problem())
        assert "triton" not in gpu.runs

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize(
        ("run", "message"),
        [
            (lambda *call: grouped(*call) * 1.01, r"^backend 'triton' differs from plain PyTorch, .* 1\.0e-02"),
            (lambda *call: grouped(*call) * math.nan, "backend 'triton' differs from plain PyTorch, .* nan"),
            (lambda *call: 1 / 0, "backend 'triton' raises ZeroDivisionError: division by zero"),
        ],
        ids=["wrong", "nan", "raising"],
    )
    def test_where_it_fails_it_is_named_once_and_never_taken(self, run, message, training, gpu):
        gpu.costs["triton"] = 0.1
        gpu.replace("triton", run)
        with pytest.warns(UserWarning, match=message) as caught:
            call(self.last(), training)
        assert len(caught) == 1
        call(self.last(batch=3), training)
        assert all(known.choice.backend == "product" for known in gpu.memory.found.values())
        gpu.memory.found.clear()
        gpu.runs = []
        call(self.last(), training)
        assert "triton" not in gpu.runs
        gpu.restart()
        call(self.last(), training)
        assert gpu.runs == ["product"]

    def test_a_wrong_gradient_alone_is_wrong(self, gpu):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, weight):
                return weight.view_as(weight)

            @staticmethod
            def backward(ctx, grad):
                return grad * 1.02

        gpu.costs["triton"] = 0.1
        gpu.replace("triton", lambda x, weight, *rest: grouped(x, Wrong.apply(weight), *rest))
        call(self.last())
        assert gpu.runs[-1] == "triton"
        with pytest.warns(
            UserWarning, match=r"differs from plain PyTorch, of whose norms its errors are \S+, \S+, 2.0e"
        ):
            call(self.last(), training=True)
        assert gpu.runs[-1] == "product"

    def test_out_of_memory_is_no_failure(self, gpu):
        gpu.replace("triton", out_of_memory)
        call(self.last())
        assert gpu.runs[-1] == "product"

    def test_what_the_file_says_of_it_is_checked_in_every_process(self, gpu):
        gpu.costs["triton"] = 0.5
        gpu.replace("triton", grouped)
        call(self.last())
        gpu.restart()
        call(self.last())
        assert (gpu.runs, gpu.timings) == (["grouped", "triton", "triton"], 0)
        call(self.last())
        assert gpu.runs[3:] == ["triton"]
        gpu.restart()
        gpu.replace("triton", lambda *call: grouped(*call) + 1)
        with pytest.warns(UserWarning, match="backend 'triton' differs"):
            call(self.last())
        assert gpu.runs[-1] == "product"
        assert "triton" not in json.loads(gpu.file.read_text())["choices"].popitem()[1]["milliseconds"]

    def test_while_a_graph_is_captured_the_file_is_not_believed(self, gpu, monkeypatch):
        gpu.costs["triton"] = 0.5
        gpu.replace("triton", grouped)
        call(self.last())
        gpu.restart()
        monkeypatch.setattr(cuda, "is_capturing", lambda: True)
        call(self.last())
        assert gpu.runs[-1] == "grouped"


def test_a_named_backend_is_not_measured(gpu):
    call(backend="shared")
    assert (gpu.runs, gpu.timings) == (["shared"], 0)


def test_on_the_cpu_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("ODCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(cuda, "milliseconds", out_of_memory)
    call()
    assert not (tmp_path / "cache").exists()


def test_explain_says_what_was_measured_and_the_times(gpu):
    layer = odconv.ODConv2d(4, 6, 3, padding=1).eval()
    x = torch.randn(2, 4, 6, 6)
    before = odconv.explain(layer, x.shape)
    assert before.backend == "grouped"
    assert before.why.endswith("; not measured yet")
    assert before.milliseconds == {}
    with torch.no_grad():
        layer(x)
    found = odconv.explain(layer, x.shape)
    assert found.backend == "product"
    assert found.milliseconds == {"shared": 3, "product": 1, "grouped": 2}
    assert str(found).startswith("product: measured on Fake GPU: product 1.000 ms, grouped 2.000 ms, shared 3.000 ms\n")
    assert odconv.explain(layer, x.shape, training=True).milliseconds == {}
    layer.train()(x)
    assert odconv.explain(layer, x.shape, training=True).milliseconds == {"shared": 6, "product": 2, "grouped": 4}
    last = odconv.explain(layer, x.shape, memory_format=torch.channels_last)
    assert last.why.endswith("; not measured yet")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            odconv.ODConv2d(3, 8, 3, padding=1, bias=True), nn.BatchNorm2d(8), odconv.CondConv2d(8, 8, 3, groups=2)
        )
        self.up = odconv.DyConvTranspose2d(8, 4, 2, stride=2)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.up(self.drop(self.body(x)))


@pytest.mark.parametrize("training", [False, True])
def test_a_network_is_tuned_ahead(training, gpu):
    torch.manual_seed(0)
    network = Network().eval()
    network.body[1].train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random = torch.get_rng_state()
    found = odconv.tune(network, (2, 3, 8, 8), training=training)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert [module.training for module in (network, *network.body)] == [False, False, True, False]
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())

    modes = [False, True] if training else [False]
    assert [(row.name, row.kind, row.training) for row in found.rows] == [
        (name, kind, mode)
        for mode in modes
        for name, kind in (("body.0", "ODConv2d"), ("body.2", "CondConv2d"), ("up", "DyConvTranspose2d"))
    ]
    assert [row.shape for row in found.rows[:3]] == [(2, 3, 8, 8), (2, 8, 8, 8), (2, 8, 6, 6)]
    assert [row.explanation.backend for row in found.rows] == ["product", "product", "grouped"] * len(modes)
    assert [len(row.explanation.milliseconds) for row in found.rows] == [3, 3, 0] * len(modes)
    assert found.note == f"measured on Fake GPU, kept in {gpu.file}"
    header, _, first, *_ = str(found).splitlines()
    assert " ".join(header.split()) == "layer kind mode input backend grouped ms shared ms product ms"
    assert " ".join(first.split()) == "body.0 ODConv2d inference 2 x 3 x 8 x 8 product 2.000 3.000 1.000"

    gpu.timings = 0
    with torch.no_grad():
        network(torch.randn(2, 3, 8, 8))
    network.train()(torch.randn(2, 3, 8, 8))
    assert (gpu.timings == 0) == training


def test_tune_takes_an_input_and_layers_of_every_kind(gpu):
    layer = odconv.KWConv2d(16, 16, 3, padding=1)
    odconv.Warehouse({"body": {"0": layer}})
    network = nn.Sequential(layer, odconv.ODConv2d(16, 8, 3, padding="same"))
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    found = odconv.tune(network, x, training=True)
    assert all(row.explanation.milliseconds for row in found.rows)
    shape = odconv.tune(network, (2, 16, 6, 6), memory_format=torch.channels_last)
    assert [row.explanation for row in shape.rows] == [row.explanation for row in found.rows[:2]]


def test_frozen_layers_are_shown_as_they_run(gpu):
    layer = odconv.ODConv2d(4, 6, 3, padding=1).requires_grad_(False)
    rows = odconv.tune(layer, (2, 4, 6, 6), training=True).rows
    assert [row.explanation.milliseconds["product"] for row in rows] == [1, 1]  # no backward pass


def test_where_there_is_nothing_to_tune_it_says_so(gpu, monkeypatch):
    layer = odconv.ODConv2d(4, 6, 3, padding=1)
    monkeypatch.setenv("ODCONV_TUNE", "0")
    found = odconv.tune(layer, (2, 4, 6, 6))
    assert found.note == "nothing was measured: ODCONV_TUNE=0 switches it off"
    assert found.rows[0].explanation.backend == "grouped"
    monkeypatch.delenv("ODCONV_TUNE")
    torch.use_deterministic_algorithms(True)
    try:
        note = odconv.tune(layer, (2, 4, 6, 6)).note
    finally:
        torch.use_deterministic_algorithms(False)
    assert note == "nothing was measured: torch.use_deterministic_algorithms asks for runs that repeat"
    monkeypatch.setattr(cuda, "is_timed", lambda device: False)
    found = odconv.tune(layer, (2, 4, 6, 6), training=True)
    assert str(found).splitlines()[-1].startswith("nothing to tune on cpu: ")
    assert [row.explanation for row in found.rows] == [
        odconv.explain(layer, (2, 4, 6, 6), training=mode) for mode in (False, True)
    ]
    assert gpu.timings == 0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("od_resnet18", (1, 3, 8, 8)), {}, TypeError, "model must be a torch.nn.Module, got str"),
        (
            (nn.Conv2d(3, 4, 3), (1, 3, 8, 8)),
            {},
            ValueError,
            "model must have dynamic layers, got a Conv2d without one",
        ),
        ((odconv.ODConv2d(3, 4, 3), 8), {}, TypeError, "input must be a tensor or a shape, .* got int"),
        (
            (odconv.ODConv2d(3, 4, 3), (1, 3, 0, 8)),
            {},
            ValueError,
            r"input must be positive ints, .* got \(1, 3, 0, 8\)",
        ),
        ((odconv.ODConv2d(3, 4, 3), (1, 5, 8, 8)), {}, ValueError, r"x must have shape \(B, C, H, W\) with C = 3"),
        (
            (odconv.ODConv2d(3, 4, 3), (1, 3, 8, 8)),
            {"memory_format": "channels_last"},
            TypeError,
            "memory_format must be a torch.memory_format, got 'channels_last'",
        ),
        (
            (odconv.ODConv1d(3, 4, 3), (1, 3, 8)),
            {"memory_format": torch.channels_last},
            ValueError,
            r"memory_format must suit an input of \(1, 3, 8\), got torch.channels_last",
        ),
    ],
)
def test_what_tune_does_not_take_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        odconv.tune(*arguments, **options)


@pytest.mark.slow
def test_the_benchmark_of_gpus_names_the_choices_in_its_dry_run(tmp_path):
    benchmark = Path(__file__).parents[1] / "benchmarks/gpu.py"
    options = ["--device", "cpu", "--quick", "--seconds", "0.01", "--parts", "correctness", "layers", "networks"]
    command = [sys.executable, str(benchmark), *options, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("not run: .", done.stdout)
    with (tmp_path / "gpu_layers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["tuned"] for row in rows} <= {"single", "shared", "product", "pointwise", "grouped"}
    assert all(row["policy"] for row in rows)
    assert {"published", "auto"} <= {row["form"] for row in rows}


def test_no_warning_where_all_is_well(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
        call(training=True)
