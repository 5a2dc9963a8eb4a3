"""The networks by torch.hub, each under its name: ``torch.hub.load(REPOSITORY, "od_resnet18", kernel_num=4)``.

The options are those of :func:`odconv.create_model`; `convert` makes a network that you have dynamic.
"""

import functools
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent / "src"))  # for where odconv is not installed

import odconv

dependencies = ["torch", "torchvision", "platformdirs"]

convert = odconv.convert


def _entry(name: str) -> functools.partial[object]:
    entry = functools.partial(odconv.create_model, name)
    entry.__doc__ = odconv.create_model.__doc__  # what torch.hub.help prints
    return entry


globals().update({name: _entry(name) for name in odconv.list_models()})
