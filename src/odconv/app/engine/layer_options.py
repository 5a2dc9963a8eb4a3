"""The options of the dynamic layers of a run's network."""

import inspect
from collections.abc import Mapping
from typing import Any

from odconv.app.engine.config import RunConfig
from odconv.models.build import METHODS, check_layer_options, split_name, with_warm_norm
from odconv.models.zoo import WAREHOUSE


def resolve_layers(config: RunConfig) -> dict[str, Any]:
    """Return the options of a run's dynamic layers by name, with what is None filled in by the defaults."""
    given: dict[str, Any] = {"kernel_num": config.kernel_num, "reduction": config.reduction}
    method_name, _ = split_name(config.arch)
    if method_name not in METHODS:  # static, or KernelWarehouse, whose settings fill themselves in
        return given
    method = METHODS[method_name]
    defaults = {name: parameter.default for name, parameter in inspect.signature(method.layer).parameters.items()}
    return {name: (defaults | method.options).get(name) if value is None else value for name, value in given.items()}


def with_norm(config: RunConfig, warm_start: bool, resumed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `layer_options` of a run: of the one that it goes on with, or with the norm that a warm start adds."""
    if resumed:
        return resumed.get("layer_options", config.layer_options)
    norm = with_warm_norm(config.arch, layer_options(config)).get("norm") if warm_start else None
    return config.layer_options if norm is None else {"norm": norm} | (config.layer_options or {})


def check_fall(arch: str, warm_start: bool, option: str, epochs: int) -> None:
    """Raise a ValueError where KernelWarehouse's blend would leave the static network of a warm start at once."""
    if warm_start and split_name(arch)[0] == WAREHOUSE and epochs == 0:
        raise ValueError(
            f"{option} must be at least 1 for warm_start of {arch}, got 0: epochs in which the blend falls from 1, the "
            "static network, to 0"
        )


def layer_options(config: RunConfig) -> dict[str, Any]:
    """Return the further options of the dynamic layers of a run: `init` and others; none for a static network."""
    given = config.layer_options or {}
    check_layer_options(config.arch, given)
    return given if split_name(config.arch)[0] is None else {"init": config.init, **given}
