"""odconv: dynamic convolution for PyTorch that costs what its multiply-adds say."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from odconv.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Import the public names when the first is asked for: the command line does without PyTorch where it can."""
        here = globals()
        if not name.startswith("__") or name == "__all__":
            public = import_module("odconv.public")
            here |= {name: getattr(public, name) for name in public.__all__} | {"__all__": public.__all__}
            if name in here:
                return here[name]
        raise AttributeError(f"module 'odconv' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
