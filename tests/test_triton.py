"""The Triton form without a GPU: what it refuses, that it compiles, and its tests under Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from odconv.ops import triton
from odconv.ops.contract import Attentions, Geometry

NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton for this machine")
X, W = torch.zeros(2, 4, 5, 5), torch.zeros(1, 6, 4, 3, 3)
GEOMETRY = Geometry((1, 1), (1, 1), (1, 1), 1)


@NEEDS_TRITON
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_the_interpreter(which):
    """In a process of its own, where Triton is imported for the interpreter."""
    tests = Path(__file__).with_name("interpreted_triton.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        which,
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--noconftest",
        str(tests),
    ]
    run = subprocess.run(
        command,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tests.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "passed" in run.stdout
    assert "skipped" not in run.stdout


# The interpreter runs what a compiler may refuse. Triton compiles for a GPU that is not there: with a driver without a
# device, the operators' own launches only compile.
COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from odconv.ops.triton import conv, conv_backward

class Hopper:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)

run, compiled = JITFunction.run, set()

def compile_only(self, *args, warmup, **options):
    run(self, *args, warmup=True, **options)
    compiled.add(self.__name__)

triton.runtime.driver.set_active(Hopper())
JITFunction.run = compile_only
zeros = lambda *shape: torch.zeros(shape, dtype=dtype)
problems = [(torch.bfloat16, 32, 64, 4, 8, 1), (torch.float32, 1, 3, 1, 5, 1), (torch.bfloat16, 16, 16, 4, 8, 16)]
for dtype, channels, filters, n, side, groups in problems:
    x, weight = zeros(1, channels, side, side), zeros(n, filters, channels // groups, 3, 3)
    kernel, spatial, channel = zeros(1, n) if n > 1 else None, zeros(1, 3, 3), zeros(1, channels)
    arguments = (x, weight, kernel, spatial, channel, None if groups > 1 else zeros(1, filters))
    geometry = ([2, 2], [1, 1], [1, 1], groups)
    y = conv(*arguments, *geometry)
    conv_backward(y, *arguments, *geometry, [True] * 6)
print(*sorted(compiled))
"""
KERNELS = "conv_gradient_kernel conv_kernel depthwise_gradient_kernel depthwise_kernel mix_gradient_kernel mix_kernel"


@NEEDS_TRITON
@pytest.mark.slow
def test_the_kernels_compile_for_hopper(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        check=False,
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == KERNELS.split()


def test_off_cuda_it_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", True)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend 'triton' needs x on a CUDA device, got x on cpu"):
        triton.triton_conv(X, W, Attentions(), GEOMETRY)


def test_without_triton_it_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", False)
    with pytest.raises(ValueError, match="backend 'triton' needs the package triton, which is not installed"):
        triton.triton_conv(X, W, Attentions(), GEOMETRY)
