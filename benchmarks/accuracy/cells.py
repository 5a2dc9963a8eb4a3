"""What is trained: cells of a data set, a network, a method and a seed, and the recipe of each."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.accuracy.networks import ABLATIONS, STARTS, Start

MAIN = ("static", "dyconv", "odconv_1x", "odconv_4x", "se", "condconv", "kw_1x", "kw_4x")
"""The methods, those first that matter most if time is short."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, the same for every method.

    `images` limits the training images (None: all). `temp_share` is the part of the training in which the temperature
    falls from temp_init to 1, 0 where it is 1 throughout, and more than 1 where it does not come that far. `start` says
    how dynamic layers begin: see :data:`benchmarks.accuracy.networks.STARTS`.
    """

    image_size: int
    epochs: int
    lr: float
    stem: Literal["standard", "small"] = "standard"
    augment: Literal["imagenet", "small"] = "imagenet"
    images: int | None = None
    batch_size: int = 64
    wd: float = 1e-4
    dropout: float = 0.0
    temp_init: float = 30.0
    temp_share: float = 0.0
    start: Start = "settled"


@dataclass(frozen=True)
class Cell:
    """A training: `split` says what it is measured on, the test images or a tenth of the training images, cut off."""

    study: Literal["main", "longer", "ablation", "tuning"]
    dataset: str
    network: str
    method: str
    seed: int
    recipe: Recipe
    split: Literal["test", "validation"] = "test"

    @property
    def name(self) -> str:
        """A name for its folder that no other cell has."""
        recipe = hashlib.sha1(repr(self.recipe).encode()).hexdigest()[:8]
        return f"{self.dataset}_{self.network}_{self.method}_seed{self.seed}_{self.split}_{recipe}"


RECIPES: dict[str, dict[tuple[str, str], Recipe]] = {
    # hours on one core of a processor
    "small": {
        ("imagenette", "mobilenetv2_050"): Recipe(64, 20, 0.02),
        ("cifar10", "resnet18_025"): Recipe(24, 6, 0.02, stem="small", augment="small", images=16000),
    },
    # long enough to converge, for a GPU
    "full": {
        ("imagenette", "mobilenetv2_050"): Recipe(96, 150, 0.05),
        ("imagenette", "resnet18"): Recipe(96, 100, 0.05, stem="small"),
        ("cifar10", "mobilenetv2_050"): Recipe(32, 150, 0.05, stem="small", augment="small"),
        ("cifar10", "resnet18"): Recipe(32, 100, 0.05, stem="small", augment="small"),
    },
}


LONGER = 3
"""How many times as long the main study is tried."""

ABLATION_EPOCHS = {"small": 5, "full": 50}
"""How long an ablation trains: on a processor shorter than the main study, as there are many of them."""

TRIED: dict[str, tuple[int, list[tuple[str, dict[str, Any]]]]] = {
    "mobilenetv2_050": (
        6,
        [(method, {"lr": lr}) for lr in (0.02, 0.05, 0.01) for method in ("static", "odconv_4x", "odconv_1x")],
    ),
    **dict.fromkeys(
        ("resnet18", "resnet18_025"),
        (3, [(method, {"lr": lr}) for lr in (0.02, 0.05, 0.1) for method in ("static", "odconv_4x")]),
    ),
}
"""Where recipes are chosen: for how many epochs, and what with which changes."""


def main_cells(scale: str, seeds: int) -> Iterator[Cell]:
    """Every method with every seed; a seed of all comes before the next."""
    for (dataset, network), recipe in RECIPES[scale].items():
        for seed in range(seeds):
            for method in MAIN:
                yield Cell("main", dataset, network, method, seed, recipe)


def longer_cells(scale: str, seeds: int) -> Iterator[Cell]:
    """Whether more epochs change the picture: some methods, on the first network of the scale."""
    (dataset, network), main = next(iter(RECIPES[scale].items()))
    recipe = replace(main, epochs=LONGER * main.epochs)
    for seed in range(seeds):
        for method in ("static", "odconv_4x", "odconv_1x", "dyconv"):
            yield Cell("longer", dataset, network, method, seed, recipe)


def ablation_cells(scale: str, seeds: int) -> Iterator[Cell]:
    """What the paper varies, on the first network of the scale, with what it is compared to where main has it not."""
    (dataset, network), main = next(iter(RECIPES[scale].items()))
    recipe = replace(main, epochs=ABLATION_EPOCHS[scale])
    compared = () if recipe == main else ("static", "odconv_1x", "odconv_4x")
    for seed in range(seeds):
        for method in (*compared, *ABLATIONS):
            yield Cell("ablation", dataset, network, method, seed, recipe)
        for start in STARTS:
            if start != recipe.start:
                yield Cell("ablation", dataset, network, "odconv_4x", seed, replace(recipe, start=start))
        for share in (0.1, 1.0):
            annealed = replace(recipe, temp_share=share, start="published")
            yield Cell("ablation", dataset, network, "odconv_4x", seed, annealed)


def tuning_cells(scale: str, seeds: int) -> Iterator[Cell]:
    """Learning rates to choose from, on images cut from the training images."""
    for (dataset, network), recipe in RECIPES[scale].items():
        epochs, tried = TRIED[network]
        short = replace(recipe, epochs=epochs, images=4000)
        for seed in range(seeds):
            for method, change in tried:
                yield Cell("tuning", dataset, network, method, seed, replace(short, **change), "validation")


STUDIES = {"main": main_cells, "longer": longer_cells, "ablation": ablation_cells, "tuning": tuning_cells}
