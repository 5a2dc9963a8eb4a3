"""The compiled library: made once for this processor and this torch, kept in the cache, checked before it is loaded."""

import ctypes
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

from odconv.system.files import alone, cache_folder, open_regular, replacing

SOURCES = Path(__file__).parent
VECTORS = {  # by what torch says of the processor
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
}
HALF = ("-mavx512bf16",)
LARGEST = 10**8
"""Bytes of a library, which has less than a hundredth of that."""

logger = logging.getLogger(__name__)


def load() -> None:
    """Load the library, compiling it where there is none in the cache, or one that is not what was compiled.

    Raises:
        OSError, RuntimeError: as :func:`build`, or it cannot be loaded.
    """
    with _open(build()) as file:  # the very file that was checked, even if another one takes its name
        ctypes.CDLL(f"/proc/self/fd/{file.fileno()}")


def build() -> Path:
    """Compile the kernel for this processor and this torch, unless that was done before.

    Returns:
        The compiled library.

    Raises:
        OSError: there is no compiler, or the cache folder cannot be written.
        RuntimeError: the compiler failed; the message holds what it said.
    """
    compiler = os.environ.get("CXX", "g++")
    root = Path(torch.__file__).parent
    flags = [
        *("-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-DAT_PARALLEL_OPENMP=1"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *VECTORS[torch.backends.cpu.get_cpu_capability()],
        *(
            HALF
            if torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
            else ()
        ),
    ]
    made_of = [
        *(file.read_text() for file in sorted(SOURCES.glob("*.[hc]*"))),
        torch.__version__,
        sys.platform,
        compiler,
        *flags,
    ]
    library = cache_folder() / f"cpu-{hashlib.sha256(' '.join(made_of).encode()).hexdigest()[:16]}.so"
    if _is_sound(library):
        return library
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"no C++ compiler {compiler!r} (environment variable CXX names another)")
    library.parent.mkdir(parents=True, exist_ok=True)
    with alone(library):
        if not _is_sound(library):  # nobody was quicker
            logger.warning("compiling odconv's kernel for the CPU into %s, once; this takes a while", library)
            for left_over in library.parent.glob(f".{library.name}*.partial"):  # by a process that was killed
                left_over.unlink(missing_ok=True)
            includes = [f"-I{root / path}" for path in ("include", "include/torch/csrc/api/include")]
            link = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
            with replacing(library) as partial:
                command = [compiler, *flags, *includes, str(SOURCES / "operators.cpp"), "-o", str(partial), *link]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[:2000]}")
                partial.chmod(0o755)  # whatever the umask is, the group shall not write to it
                digest = hashlib.sha256(partial.read_bytes()).hexdigest()
            with replacing(_record_of(library)) as partial:
                partial.write_text(digest)
    return library


def _is_sound(library: Path) -> bool:
    try:
        _open(library).close()
    except OSError:
        return False
    return True


def _open(library: Path) -> BinaryIO:
    """Open a library, and see that it is what was compiled, by this user or by root, and that no other can change it.

    Raises:
        OSError: it is not.
    """
    file = open_regular(library, LARGEST)
    status = os.fstat(file.fileno())
    ours = status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    with suppress(OSError):  # no record
        if ours and hashlib.sha256(file.read()).hexdigest() == _record_of(library).read_text(errors="replace"):
            return file
    file.close()
    raise OSError(f"{library} is not the library that was compiled for this user, or damaged")


def _record_of(library: Path) -> Path:
    """Where the digest of a library is noted."""
    return library.with_suffix(".sha256")
