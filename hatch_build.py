"""Compile the C++ into a wheel for one system, which ODCONV_COMPILED=1 asks for; else the wheel is for all systems.

The environment that builds needs PyTorch, of any version that pyproject.toml allows, and a C++ compiler.
"""

import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledKernels(BuildHookInterface):
    """Puts a library of each variant of the kernel into the wheel."""

    folder: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say for which system the wheel is."""
        if version != "standard" or os.environ.get("ODCONV_COMPILED") != "1":
            return
        sys.path.insert(0, str(Path(self.root, "src")))
        from odconv.ops.cpu import library

        if sys.platform != "linux" or not library.VARIANTS:
            raise RuntimeError(
                f"ODCONV_COMPILED=1 makes wheels for Linux on {' or '.join(library.MACHINES)}, "
                f"got {sys.platform} on {platform.machine()}: without it the wheel is for all systems"
            )
        self.folder = tempfile.TemporaryDirectory()  # until the wheel is written
        folder = Path(self.folder.name)
        for name in library.VARIANTS:
            command = library.command_for(name)
            library.check_compiler(command)
            library.compile_to(folder / f"{name}.so", command)
            place = (library.SHIPPED / f"{name}.so").relative_to(Path(self.root, "src"))
            build_data["force_include"][str(folder / f"{name}.so")] = str(place)
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"py3-none-{system}"}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled, which the wheel holds now."""
        if self.folder is not None:
            self.folder.cleanup()
