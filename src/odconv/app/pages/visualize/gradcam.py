"""Where a network looks: Grad-CAM, by captum."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 8
"""Images at a time."""
LEAST_SIDE = 3
"""Positions along a side from which a map says where something is."""


def choose_layer(model: nn.Module, images: Tensor, wanted: str | None = None) -> str | None:
    """Choose the layer whose map is weighted: by default the last stage whose map has at least 3 x 3 positions.

    Returns its name, None where there is no such stage; a ValueError if the wanted layer gives no map.
    """
    sides: dict[str, int] = {}  # in the order in which layers are done

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            sides.pop(name, None)
            sides[name] = min(output.shape[2:])

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(lambda _, __, output, name=name: note(name, output)))
        model(images[:1])
    stages = [name for name, side in sides.items() if name.count(".") <= 1 and side >= LEAST_SIDE]
    if wanted is not None and wanted not in sides:
        such = (stages or [*sides])[-1]
        raise ValueError(f"cam_layer must be a layer that gives a map, such as {such}, got {wanted}")
    return wanted or (stages[-1] if stages else None)


def grad_cam(model: nn.Module, layer: str, images: Tensor, targets: Tensor) -> Tensor:
    """Return what speaks for the targets, a class of each image (B), position by position on the map of a layer.

    It is 1 where that is most and 0 where nothing does, (B, h, w) as the map is, on the CPU.
    """
    from captum.attr import LayerGradCam

    cam = LayerGradCam(model, model.get_submodule(layer))
    parts = zip(images.split(BATCH), targets.split(BATCH), strict=True)  # for the maps of all layers are kept
    found = [cam.attribute(some, their, relu_attributions=True).detach().float()[:, 0].cpu() for some, their in parts]
    maps = torch.cat(found)
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)


def overlay(pixels: np.ndarray, heat: Tensor) -> np.ndarray:
    """Return an image (H, W, 3) of bytes in grey, coloured where `heat` (h, w) says, as far as it does."""
    from matplotlib import colormaps

    heat = F.interpolate(heat[None, None], pixels.shape[:2], mode="bicubic", align_corners=False)[0, 0]
    heat = heat.clamp(0, 1).nan_to_num()
    strength = 0.75 * heat.numpy()[..., None] ** 0.7
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    colours = 255 * colormaps["inferno"](0.25 + 0.65 * heat.numpy())[..., :3]
    return ((1 - strength) * grey[..., None] + strength * colours).round().clip(0, 255).astype(np.uint8)
