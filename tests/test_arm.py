"""The compiled kernel on 64-bit ARM: made by a cross compiler, and run in emulation, which `make arm` sets up."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARM = ROOT / ".venv-arm"
TESTS = {  # what computes; not what starts processes, compiles networks, or wants packages
    "test_cpu.py": "large_problems or float32 or threads or strides or depth_wise or operators or attention",
    "test_half.py": "",
    "test_cells.py": "tile_by_tile or any_cells or gradients or threads or operator",
    "test_dynamic_conv.py": "every_form_is_the_reference or (gradcheck and cpu) or (low_precision and cpu)",
    "test_epilogue.py": "every_form or batch or ends_of_numbers or refuses or computes_what or means_are",
    "test_fused_attention.py": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("file", TESTS)
def test_on_64_bit_arm(file, tmp_path_factory):
    missing = [program for program in ("aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(program) is None]
    if missing or not (ARM / "installed").is_file():
        pytest.skip(f"no {' nor '.join([*missing, 'environment of `make arm`'])} here")
    changes = {
        "CXX": "aarch64-linux-gnu-g++",
        "ODCONV_CACHE": str(tmp_path_factory.getbasetemp() / "arm"),  # compiled once for all files
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, ARM / "packages"))),
        "QEMU_LD_PREFIX": str(ARM / "system"),
        "QEMU_CPU": "neoverse-n1",
        "OMP_NUM_THREADS": "1",
    }
    python = ["qemu-aarch64", str(ARM / "system/usr/bin/python3")]
    tests = ["-q", "-p", "no:cacheprovider", "--hypothesis-profile", "ci", f"tests/{file}", "-k", TESTS[file]]
    command = [*python, "-m", "pytest", *tests]
    run = subprocess.run(command, env=os.environ | changes, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout
