"""The keys of state dicts: what wraps them, and those of attentions."""

from collections.abc import Iterable, Mapping

from torch import Tensor

WRAPPERS = ("module.", "model.")
"""What DataParallel and LightningModules put before every key."""

NOTED_TEMPERATURE = "odconv.temperature"
"""Where a safetensors file's header records the temperature, for files without those keys."""

TEMPERATURE = "attention.temperature"
"""What the keys end with that hold an attention's temperature; published files have none."""

FACTORS = "attention.factors"
"""What the keys end with that hold an attention's factors, where they are not the published ones."""

BLEND, ASSIGNMENT = "attention.blend", "attention.assignment"
"""What the keys end with that KernelWarehouse's published files lack: its blend, and where its kernels lie."""

OPTIONAL = ("num_batches_tracked", BLEND, ASSIGNMENT)
"""What the keys end with that a file need not hold."""


def bare_names(keys: Iterable[str]) -> dict[str, str]:
    """Map each key to itself without what wraps nearly all (nine of ten) of them, and without torch.compile's mark."""
    bare = {key: key.replace("_orig_mod.", "") for key in keys}
    while wrapper := next((w for w in WRAPPERS if sum(b.startswith(w) for b in bare.values()) > 0.9 * len(bare)), None):
        shorter = {key: name.removeprefix(wrapper) for key, name in bare.items()}
        if len(set(shorter.values())) < len(bare):
            break
        bare = shorter
    return bare


def attention_of(key: str) -> str:
    """Return the attention's name in the key of a tensor: "conv1.attention" of "conv1.attention.fc.weight"."""
    return key.rsplit(".", 1 if key.endswith(FACTORS) else 2)[0]


def is_temperature(key: str, state: Mapping[str, Tensor]) -> bool:
    """Tell an attention's temperature from other tensors of that name: a number, beside heads."""
    if not key.endswith(TEMPERATURE) or state[key].numel() != 1:
        return False
    place = key.removesuffix("temperature")
    return any(f"{place}{name}_fc.weight" in state for name in ("kernel", "channel", "filter", "spatial"))


def dynamic_layers(keys: Iterable[str]) -> set[str]:
    """Return the names of the layers with an attention of their own; a lone layer has the name ""."""
    return {f".{key}".rpartition(".attention.")[0][1:] for key in keys if ".attention." in f".{key}"}


def norm_of(keys: Iterable[str]) -> str:
    """Tell the norm of the attentions from their parts."""
    names = {f".{key}".partition(".attention.")[2] for key in keys}
    return "batch norm" if "bn.running_mean" in names else "layer or group norm" if "bn.weight" in names else "no norm"


def method_of(keys: Iterable[str]) -> str:
    """Tell the method of dynamic layers from the parts of their attentions."""
    parts = {f".{key}".partition(".attention.")[2].partition(".")[0] for key in keys}
    if "fc1" in parts:
        return "KernelWarehouse"
    return "ODConv" if "channel_fc" in parts else "DyConv" if "fc" in parts else "CondConv"
