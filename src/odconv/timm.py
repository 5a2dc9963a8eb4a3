"""The zoo in timm: after ``import odconv.timm``, ``timm.create_model("od_resnet50", kernel_num=4)`` builds one of ours.

They are timm's own ResNets and MobileNetV2s with dynamic convolutions, and so have all that timm's have, and its keys.
Only dynamic networks are registered; under the static names, timm has networks of its own.

``python -m odconv.timm SCRIPT ...`` runs a script that does not import this module, such as timm's train.py.
"""

import argparse
import runpy
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from odconv.conversion.convert import convert, options_of
from odconv.conversion.warehouse import NAME, stock
from odconv.models.build import METHODS, build_static, shapes_alone, split_name
from odconv.models.warehouse import OPTIONS, plan
from odconv.models.zoo import BACKBONES, WAREHOUSE
from odconv.system.packages import needed_by

with needed_by("odconv.timm", "timm"):
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        get_pretrained_cfg_value,
        is_model,
        model_entrypoint,
        register_model,
        resolve_pretrained_cfg,
    )

FIRST = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
OTHERS = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
BLOCKS = [f"blocks.{stage}.{block}" for stage, size in enumerate((1, 2, 3, 4, 3, 3, 1)) for block in range(size)]
PUBLISHED = {
    **{"features.0.0": "conv_stem", "features.0.1": "bn1"},
    **{
        f"features.{index}.conv.{theirs}": f"{block}.{ours}"
        for index, block in enumerate(BLOCKS, 1)
        for theirs, ours in (FIRST if index == 1 else OTHERS).items()
    },
    **{"features.18.0": "conv_head", "features.18.1": "bn2", "classifier.1": "classifier"},
}
"""The layers of a MobileNetV2: the names that torchvision and the published files have, and those of timm."""


def published(model: nn.Module) -> nn.Module:
    """Show a network of timm under the published names, which those of its ResNets are already.

    So ``odconv.load_checkpoint(published(model), path)`` loads a file of ours, and
    ``odconv.checkpoints.save_safetensors(published(model), path)`` writes one for :func:`odconv.create_model`.

    Args:
        model: a network that timm built under one of our names; with ``features_only`` it has no classifier, and takes
            ``strict=False`` to load a file that has one.

    Returns:
        A module without forward, whose layers are those of the model, not copies. Of a ResNet, the model itself.

    Raises:
        ValueError: the model is a MobileNetV2 that lacks blocks, or has other names for them.
    """
    layers = dict(model.named_modules())
    if "conv_stem" not in layers:
        return model
    if lost := [block for block in BLOCKS if block not in layers]:
        raise ValueError(f"model must be a MobileNetV2 with all blocks under timm's names, got none at {lost[0]}")
    view = nn.Module()
    names = PUBLISHED
    if NAME in layers:
        view.add_module(NAME, layers[NAME])
        if isinstance(layers.get("classifier"), nn.Linear):  # published without dropout's place before it
            names = {name.replace("classifier.1", "classifier"): own for name, own in names.items()}
    for name, own in names.items():
        *path, last = name.split(".")
        parent = view
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if own in layers:  # with features_only there is no head
            parent.add_module(last, layers[own])
    return view


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Rename published keys to those of timm; others stay.

    Args:
        state_dict: tensors by name.
        model: what they are for; timm passes it, and it does not matter.

    Returns:
        The same tensors.
    """
    return {timm_key(key): tensor for key, tensor in state_dict.items()}


def timm_key(key: str) -> str:
    """Return the name that timm has for a tensor of a published file."""
    for name, own in PUBLISHED.items():
        if key.startswith(f"{name}."):
            return own + key.removeprefix(name)
    return key


def take_published(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename published keys before loading, since timm asks no filter when it loads a `checkpoint_path`."""
    for key in [key for key in state if key.startswith(prefix)]:
        renamed = prefix + timm_key(key.removeprefix(prefix))
        if renamed != key:
            state[renamed] = state.pop(key)


def builder(name: str) -> Callable[..., nn.Module]:
    """Make the function that timm calls to build a network."""
    method, backbone = split_name(name)
    stem = get_pretrained_cfg_value(backbone, "first_conv")
    known = OPTIONS if method == WAREHOUSE else options_of(METHODS[str(method)].layer)

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay"))
        if pretrained and not (cfg.has_weights or cfg.state_dict):
            raise ValueError(
                f"pretrained must be False for {name} (encoder_weights=None in segmentation_models_pytorch): timm has "
                "no weights of it to download; pretrained_cfg_overlay={'file': path} names a file to load"
            )
        layer_options = {key: options.pop(key) for key in known if key in options}
        fixed: dict[str, Any] = {}
        if options.get("features_only") and stem == "conv_stem" and not options.keys() & {"feature_cls", "feature_cfg"}:
            if method == WAREHOUSE:
                raise ValueError(
                    f"features_only must be False for {name}: its last convolution, which no feature needs, "
                    "shares cells with those before it"
                )
            # timm has a class of its own for the features of these, without a head
            fixed["features_only"] = options.pop("features_only")
            options["pretrained_strict"] = False

        def network(**arguments: Any) -> nn.Module:
            model = model_entrypoint(backbone)(**arguments, **fixed)
            make_dynamic(model, name, layer_options)
            model.register_load_state_dict_pre_hook(take_published)
            return model

        return build_model_with_cfg(network, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **options)

    build.__name__ = name
    return build


def make_dynamic(model: nn.Module, name: str, layer_options: dict[str, Any]) -> None:
    """Replace the convolutions of a static network of timm, in place, to make that of one of our names."""
    method_name, backbone = split_name(name)
    if method_name == WAREHOUSE:
        with shapes_alone():
            pools, options = plan(build_static(BACKBONES[backbone], 1000, 0.0), BACKBONES[backbone], **layer_options)
        if "conv_stem" in model._modules:
            pools = {pool: [PUBLISHED[layer] for layer in layers] for pool, layers in pools.items()}
        stock(model, pools, **options)
        return
    method, stem = METHODS[str(method_name)], get_pretrained_cfg_value(backbone, "first_conv")

    def chosen(path: str, conv: nn.Module) -> bool:
        return path.split(".", maxsplit=1)[0] != stem and (method.shortcuts or ".downsample." not in path)

    convert(model, method.layer, include=chosen, warm_start=False, **method.options | layer_options)


def run_script() -> None:
    """Run the script that the command line names, with its own arguments, as ``python SCRIPT ...`` would."""
    parser = argparse.ArgumentParser(
        "python -m odconv.timm",
        usage="%(prog)s SCRIPT [arguments of the script]",
        description="Run a Python script, such as timm's train.py, in which timm knows the networks of odconv.",
    )
    parser.add_argument("script", metavar="SCRIPT", help="a file of Python code")
    script = parser.parse_args(sys.argv[1:2]).script
    if not Path(script).is_file():
        parser.error(f"SCRIPT must be a file of Python code, got {script}, which is none")
    import_module("odconv.timm")  # not this module, which is __main__ here, and no longer when the script runs
    del sys.argv[0]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


NAMES = [f"{method}_{backbone}" for method in (*METHODS, WAREHOUSE) for backbone in BACKBONES if is_model(backbone)]
default_cfgs = generate_default_cfgs({  # timm looks here
    name: {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        **{part: get_pretrained_cfg_value(split_name(name)[1], part) for part in ("first_conv", "classifier")},
    }
    for name in NAMES
})  # fmt: skip

if __name__ == "__main__":
    run_script()
else:
    globals().update({name: register_model(builder(name)) for name in NAMES})
