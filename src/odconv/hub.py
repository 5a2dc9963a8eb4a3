"""Networks of the zoo on the Hugging Face Hub: weights, what builds the network, and a card with its costs."""

import inspect
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from odconv.checkpoints import RELEASED, find_released, load_checkpoint, save_safetensors
from odconv.checkpoints.finding import meant
from odconv.models.build import check_described, create_model, with_warm_norm
from odconv.profiling import profile
from odconv.profiling.table import short
from odconv.system.packages import needed_by

with needed_by("odconv.hub", "'odconv[models]'"):
    from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download

START = ("weights", "warm_start", "new_classifier", "init")
WEIGHTS = RELEASED
CONFIG = "config.json"
CARD = """---
{{ card_data }}
---

# {{ repo_id or facts.name }}

An image classifier with dynamic convolutions, for the Python package `odconv`:

```python
from odconv.hub import HubModel

model = HubModel.from_pretrained("{{ repo_id or "owner/name" }}")
```

| | |
| --- | --- |
{%- for fact, value in facts.items() %}
| {{ fact }} | {{ value }} |
{%- endfor %}
"""


class HubModel(
    nn.Module,
    ModelHubMixin,
    library_name="odconv",
    pipeline_tag="image-classification",
    tags=["dynamic-convolution"],
    model_card_template=CARD,
):
    """A network of the zoo with `save_pretrained`, `from_pretrained` and `push_to_hub` of huggingface_hub.

    A repository has model.safetensors, with the published keys and each attention's temperature;
    config.json, the arguments that build the network; and a card. ``create_model(..., weights="owner/name")`` reads the
    weights too.

    Args:
        name: one of :func:`odconv.list_models`.
        **options: the other arguments of :func:`odconv.create_model`, `weights` for example.

    Attributes:
        model: the network itself.
        config: the arguments that build it, without those that say what weights it starts from.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.model = create_model(name, **options)
        arguments = inspect.signature(create_model).bind(name, **options)
        arguments.apply_defaults()
        layer_options = arguments.arguments.pop("layer_options")
        if arguments.arguments["warm_start"]:
            layer_options = with_warm_norm(name, layer_options)
        self.config = {k: v for k, v in (arguments.arguments | layer_options).items() if k not in START}

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images (B, 3, H, W)."""
        return self.model(x)

    def generate_model_card(
        self, *, accuracy: str | None = None, image_size: int = 224, repo_id: str | None = None
    ) -> ModelCard:
        """Return the card, whose costs are counted here (:func:`odconv.profile`).

        The arguments are the `model_card_kwargs` of `save_pretrained` and `push_to_hub`.

        Args:
            accuracy: what was measured, on which data, in your words. Default: the card says nothing of it.
            image_size: side of the images that the network is for, in pixels.
            repo_id: owner/name on the Hub, for the card's title and example.
        """
        counts = profile(self.model, (3, image_size, image_size))
        facts = {key: value for key, value in self.config.items() if value is not None}
        facts["parameters"] = f"{counts.parameters / 1e6:.2f}M"
        facts[f"multiply-adds at {image_size} x {image_size}"] = short(counts.madds)
        if accuracy is not None:
            facts["accuracy"] = accuracy
        return super().generate_model_card(facts=facts, repo_id=repo_id)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_safetensors(self.model, save_directory / WEIGHTS)
        (save_directory / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "HubModel":
        """Load a network and its weights; it is in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder of `save_pretrained` or `odconv release`, the name of released
                weights (:func:`odconv.checkpoints.find_released`), or owner/name on the Hub.
            **options: those of huggingface_hub's `from_pretrained`, `revision` and `token` for example.

        Raises:
            FileNotFoundError: a name without an owner that is neither a folder nor of released weights.
            ValueError: its config.json names no network of odconv, or the weights do not fit.
        """
        place = find_released(pretrained_model_name_or_path)
        if not place.is_dir() and len(place.parts) == 1:  # not asked of the Hub, where every repository has an owner
            raise FileNotFoundError(f"{place} is neither a folder nor owner/name on the Hub{meant(place)}")
        return super().from_pretrained(place if place.is_dir() else pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "HubModel":
        # revision, token and so on: of the caller alone, and not whatever else config.json might say of a download
        callers, known = (
            inspect.signature(f).parameters.keys() for f in (ModelHubMixin.from_pretrained, hf_hub_download)
        )
        where = {key: options.pop(key) for key in [*options] if key in callers & known}
        folder = Path(model_id)
        file = folder / WEIGHTS if folder.is_dir() else hf_hub_download(model_id, WEIGHTS, **where)
        if "name" not in options:
            raise ValueError(f"{model_id} has no {CONFIG} that names a network of odconv")
        if elsewhere := [key for key in ("weights", "warm_start") if options.get(key)]:
            raise ValueError(
                f"{CONFIG} of {model_id} must not say {' and '.join(elsewhere)}: {WEIGHTS} are its weights"
            )
        check_described(Path(file), **options)
        model = cls(**options)
        load_checkpoint(model.model, file)
        return model.eval()
