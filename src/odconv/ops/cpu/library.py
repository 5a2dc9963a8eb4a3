"""The compiled library: brought along by a wheel, or made once for this processor, kept in the cache and checked."""

import ctypes
import hashlib
import logging
import os
import platform
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
SHIPPED = SOURCES / "compiled"
"""Where a wheel for one system has the library of each variant."""
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq")
MACHINES: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")},
    "aarch64": {"neon": ()},  # which all of them have
}
VARIANTS = MACHINES.get(platform.machine(), {})
"""Flags of the compiler for each variant on machines of this kind; those of x86 are what torch calls the processor."""
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020c000000000000")
"""Flags of all. What is compiled runs with PyTorch from 2.12 on, since it uses the stable ABI of that version."""
LARGEST = 10**8
"""Bytes of a library, which has less than a hundredth of that."""

logger = logging.getLogger(__name__)


def variant() -> str | None:
    """Return which variant this processor runs, or None."""
    if "neon" in VARIANTS:
        return "neon"
    name = torch.backends.cpu.get_cpu_capability().lower()
    if name == "avx512" and torch.cpu._is_avx512_bf16_supported():
        name = "avx512_bf16"
    return name if name in VARIANTS else None


def load() -> None:
    """Load the library that came with the package, or else compile it, unless that was done before.

    Raises:
        OSError, RuntimeError: as :func:`build`, or it cannot be loaded.
    """
    shipped = SHIPPED / f"{variant()}.so"
    if shipped.is_file():
        with suppress(OSError):  # a PyTorch that it does not fit
            ctypes.CDLL(str(shipped))
            return
    with _open(build()) as file:  # the very file that was checked, even if another one takes its name
        ctypes.CDLL(f"/proc/self/fd/{file.fileno()}")


def build() -> Path:
    """Compile the kernel for this processor into the cache, unless there is one that is what was compiled.

    Returns:
        The compiled library.

    Raises:
        OSError: there is no compiler, or the cache folder cannot be written.
        RuntimeError: no variant is for this processor, or the compiler failed; the message holds what it said.
    """
    name = variant()
    if name is None:
        raise RuntimeError(f"no variant of the kernel is for this processor, only {[*VARIANTS]}")
    command = command_for(name)
    sources = [file.read_text() for file in sorted(SOURCES.glob("*.[hc]*"))]
    made_of = [*sources, sys.platform, command[0], *FLAGS, *VARIANTS[name]]
    library = cache_folder() / f"cpu-{hashlib.sha256(' '.join(made_of).encode()).hexdigest()[:16]}.so"
    if _is_sound(library):
        return library
    check_compiler(command)
    library.parent.mkdir(parents=True, exist_ok=True)
    with alone(library):
        if not _is_sound(library):  # nobody was quicker
            logger.warning("compiling odconv's kernel for the CPU into %s, once; this takes a while", library)
            for left_over in library.parent.glob(f".{library.name}*.partial"):  # by a process that was killed
                left_over.unlink(missing_ok=True)
            with replacing(library) as partial:
                compile_to(partial, command)
                partial.chmod(0o755)  # whatever the umask is, the group shall not write to it
                digest = hashlib.sha256(partial.read_bytes()).hexdigest()
            with replacing(_record_of(library)) as partial:
                partial.write_text(digest)
    return library


def command_for(name: str) -> list[str]:
    """Return the compiler and its arguments for a variant, but for where to write."""
    root = Path(torch.__file__).parent
    places = (f"-I{root / 'include'}", f"-L{root / 'lib'}")
    return [
        *(os.environ.get("CXX", "g++"), *FLAGS, *VARIANTS[name]),
        *(*places, str(SOURCES / "operators.cpp"), "-ltorch_cpu"),
    ]


def check_compiler(command: list[str]) -> None:
    """Raise a FileNotFoundError unless there is the compiler of a command."""
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"no C++ compiler {command[0]!r} (environment variable CXX names another)")


def compile_to(path: Path, command: list[str]) -> None:
    """Run a command of :func:`command_for`.

    Raises:
        RuntimeError: the compiler failed; the message holds what it said.
    """
    done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[:2000]}")


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
