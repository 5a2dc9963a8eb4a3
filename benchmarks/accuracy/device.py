"""Cells on one GPU, in minutes: the images stay on it, and the networks of a group are trained side by side.

Networks this small leave most of a large GPU idle, and Python launches their kernels slower than these run. So an epoch
is augmented at once, a step is recorded as a CUDA graph, and each network's graph runs on a stream of its own. Trained
is as in :mod:`benchmarks.accuracy.training`, but under bfloat16 autocast, and without the last, smaller batch of an
epoch, as a graph has one shape. On a CPU the same is done in float32, one network after the other.
"""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from benchmarks.accuracy.cells import Cell, Recipe
from benchmarks.accuracy.networks import ABLATIONS, METHODS, build
from benchmarks.accuracy.training import FOLDERS, MEASURED, SPLIT_SEED, VALIDATION
from benchmarks.common import origin
from torch import Tensor, nn
from torch.nn import functional as F

import odconv
from odconv.app.classify.config import TrainConfig
from odconv.app.classify.schedule import learning_rate, temperature
from odconv.app.data import Images, normalise, open_data
from odconv.profiling.count import count_parameters

MIN_SCALE, RATIO, TRIES = 0.35, 4 / 3, 10  # of a crop: its least area, its most ratio, and what torchvision tries
TEST_BATCH = 250
EAGER, WARM_UP, TIMED = 3, 5, 20  # steps before one is recorded, before they are timed, and that are timed
RESERVE = 1.1  # of the time that all steps take: epochs are prepared, and the networks measured

Loaded: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, list[str]]
"""Images to train on, bytes (N, 3, S, S), and their labels (N), the same to measure on, and the classes."""


def run_within(
    cells: Sequence[Cell], data: Path, device: torch.device, minutes: float, *, compile: bool, groups_of: int = 6
) -> Iterator[dict[str, Any]]:
    """Train groups of cells in the order given as long as one fits in what is left of the minutes; yield their rows.

    What is skipped is printed. A group that differs from an earlier one in the seeds alone needs as long as that one.
    """
    deadline = time.monotonic() + 60 * minutes
    needed: dict[Any, float] = {}
    for group in plan(cells, groups_of):
        kind = group[0].recipe, tuple((cell.dataset, cell.network, cell.split, cell.method) for cell in group)
        started = time.monotonic()
        if started + needed.get(kind, 0.0) >= deadline:
            print_skipped(group, needed.get(kind, 0.0), deadline - started)
            continue
        rows = [*train_cells(group, data, device, compile=compile, deadline=deadline)]
        needed[kind] = time.monotonic() - started if rows else math.inf
        yield from rows


def plan(cells: Sequence[Cell], groups_of: int) -> Iterator[list[Cell]]:
    """Yield the cells in groups of at most so many that can be trained side by side, without changing their order."""
    for _, alike in groupby(cells, lambda cell: (cell.dataset, cell.network, cell.split, cell.recipe)):
        waiting = iter(alike)
        while group := [*islice(waiting, groups_of)]:
            yield group


def train_cells(
    cells: Sequence[Cell], data: Path, device: torch.device, *, compile: bool, deadline: float
) -> Iterator[dict[str, Any]]:
    """Train cells side by side that differ in method and seed alone, and yield their rows at the end.

    Yields nothing if the deadline, in time.monotonic(), passes before, or the first steps show that it will.
    """
    group = Group(cells, data, device, compile)
    course = group.course(deadline)
    needed = RESERVE * group.find_pace(course) * (group.total - group.done)
    left = deadline - time.monotonic()
    if needed > left:
        print_skipped(cells, needed, left)
        return
    for _ in course:
        pass
    if group.done < group.total:
        print(f"{title(cells)}: stopped, no time is left", flush=True)
        return
    yield from group.rows()


def title(cells: Sequence[Cell]) -> str:
    """Name a group in a line."""
    return f"{cells[0].dataset} {cells[0].network} " + ", ".join(f"{cell.method} seed {cell.seed}" for cell in cells)


def print_skipped(cells: Sequence[Cell], needed: float, left: float) -> None:
    """Say what is not trained; the time needed is infinite where more of it was not enough for a group alike."""
    reason = f"{needed / 60:.1f} minutes are needed" if needed < math.inf else "one like it did not fit"
    print(f"{title(cells)}: skipped, {reason} and {max(0.0, left) / 60:.1f} are left", flush=True)


class Group:
    """Networks that are trained side by side on the same images.

    Attributes:
        side_by_side: whether each runs on a stream of its own.
        steps: of an epoch.
        total: steps of the whole training.
        done: steps so far.
    """

    def __init__(self, cells: Sequence[Cell], data: Path, device: torch.device, compile: bool) -> None:
        *self.training, self.tests, self.test_labels, classes = choose_images(cells[0], data, device)
        self.recipe, self.device = cells[0].recipe, device
        self.networks = [Network(cell, len(classes), device, compile) for cell in cells]
        self.steps = max(1, len(self.training[0]) // self.recipe.batch_size)
        self.total, self.done = self.recipe.epochs * self.steps, 0
        self.side_by_side, self.started = True, time.monotonic()

    def course(self, deadline: float) -> Iterator[None]:
        """Train up to the end or the deadline, and yield after every step; what diverges takes part no longer."""
        for epoch in range(self.recipe.epochs):
            training = [network for network in self.networks if math.isfinite(network.loss)]
            seeds = {network.cell.seed for network in training}
            batches = {seed: make_batches(*self.training, self.recipe, seed, epoch) for seed in seeds}
            for network in training:
                network.begin(epoch)
            wait(self.device)  # the networks' streams read what was written on this one
            for step in range(self.steps):
                if time.monotonic() > deadline:
                    return
                for network in training:
                    with torch.cuda.stream(network.stream if self.side_by_side else None):
                        network.step(*batches[network.cell.seed][step], self.done, self.steps)
                self.done += 1
                yield
            wait(self.device)
            for network in training:
                network.end(self.steps)

    def find_pace(self, course: Iterator[None]) -> float:
        """Take the first steps side by side and one after the other; stay with what is faster: so many s a step."""
        paces = {}
        for side_by_side in (True, False):
            self.side_by_side = side_by_side
            self.time_steps(course, WARM_UP)
            paces[side_by_side] = self.time_steps(course, TIMED)
        self.side_by_side = paces[True] < paces[False]
        cells = [network.cell for network in self.networks]
        milliseconds = f"{1e3 * paces[True]:.1f} ms a step side by side, {1e3 * paces[False]:.1f} one after the other"
        print(f"{title(cells)}: {milliseconds}", flush=True)
        return min(paces.values())

    def time_steps(self, course: Iterator[None], count: int) -> float:
        """Take so many steps, and return how long one takes, in s."""
        started = time.monotonic()
        for _ in islice(course, count):
            pass
        wait(self.device)
        return (time.monotonic() - started) / count

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each network; its `seconds` are its share of those of the group."""
        wait(self.device)
        seconds = (time.monotonic() - self.started) / len(self.networks)
        for network in self.networks:
            cell = network.cell
            yield {
                "study": cell.study,
                "dataset": cell.dataset,
                "network": cell.network,
                "method": cell.method,
                "kernel_num": (METHODS | ABLATIONS)[cell.method].kernel_num or "",
                "seed": cell.seed,
                "split": cell.split,
                "parameters": count_parameters(network.model),
                "train_images": len(self.training[0]),
                **asdict(cell.recipe),
                **network.results(self.tests, self.test_labels),
                "seconds": f"{seconds:.0f}",
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
                "finished": time.strftime("%Y-%m-%d"),
                **origin(),
            }


class Network:
    """A network in training; `loss` is the mean of the last epoch."""

    def __init__(self, cell: Cell, classes: int, device: torch.device, compile: bool) -> None:
        recipe = cell.recipe
        torch.manual_seed(cell.seed)
        model = build(cell.network, cell.method, recipe.stem, classes, recipe.dropout, recipe.start)
        self.cell, self.device = cell, device
        self.model = model.to(device, memory_format=layout(device))
        self.compiled = compiled(self.model) if compile else self.model
        self.rate = torch.zeros((), device=device)  # a tensor, which a graph reads anew in each step
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), self.rate, momentum=0.9, weight_decay=recipe.wd, fused=True
        )
        self.config = schedule(recipe)
        self.temperature, self.loss = 1.0, 0.0
        self.total = torch.zeros((), device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, epoch: int) -> None:
        """Set the learning rate of an epoch."""
        self.rate.fill_(learning_rate(self.config, epoch))
        self.total.zero_()

    def step(self, images: Tensor, labels: Tensor, number: int, steps: int) -> None:
        """Take a step, counted from 0, of an epoch of so many steps."""
        torch.manual_seed(hash((self.cell.seed, number)))  # of dropout, whoever else is trained
        degrees = temperature(self.config, number + 1, steps)
        if degrees != self.temperature:
            odconv.set_temperature(self.model, degrees)
            self.temperature = degrees
        if self.stream is not None and number == EAGER:
            self.record(images, labels)
        if self.graph is None:
            self.learn(images, labels)
        else:
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.graph.replay()

    def record(self, images: Tensor, labels: Tensor) -> None:
        """Record a step, without taking it, on images and labels that are exchanged from then on."""
        self.images, self.labels, self.graph = images.clone(), labels.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.learn(self.images, self.labels)

    def learn(self, images: Tensor, labels: Tensor) -> None:
        """Go down the gradient of a batch; no gradient is left, as a graph must find none."""
        with autocast(self.device):
            loss = F.cross_entropy(self.compiled(images), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.total += loss.detach()

    def end(self, steps: int) -> None:
        """Note the loss of an epoch."""
        self.loss = self.total.item() / steps

    @torch.no_grad()
    def results(self, images: Tensor, labels: Tensor) -> dict[str, str]:
        """Measure: top1 and top5 in %, and the loss; not compiled, for that would take longer than it saves."""
        if not math.isfinite(self.loss):
            return dict.fromkeys(("top1", "top5", "train_loss"), "diverged")
        self.model.eval()
        hits = []
        for part, truth in zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
            with autocast(self.device):
                logits = self.model(normalise(part).contiguous(memory_format=layout(self.device)))
            hits.append(logits.topk(min(5, logits.shape[1])).indices == truth[:, None])
        found = torch.cat(hits)
        shares = {"top1": found[:, 0], "top5": found.any(1)}
        return {
            **{name: f"{100 * share.double().mean().item():.4f}" for name, share in shares.items()},
            "train_loss": f"{self.loss:.4f}",
        }


def schedule(recipe: Recipe) -> TrainConfig:
    """What the functions of :mod:`odconv.app.classify.schedule` need to know of a recipe."""
    return TrainConfig(
        out="",
        arch="",
        data="",
        epochs=recipe.epochs,
        lr=recipe.lr,
        lr_decay="cos",
        temp_init=recipe.temp_init,
        temp_epoch=recipe.temp_share * recipe.epochs,  # type: ignore[arg-type]  # a fraction of an epoch is fine
    )


def compiled(model: nn.Module) -> Any:
    """Return what runs a network compiled."""
    torch._dynamo.config.recompile_limit = 100  # the forward of a network is compiled anew for each method
    return torch.compile(model, dynamic=False)


def layout(device: torch.device) -> torch.memory_format:
    """The order in memory that suits the device's convolutions."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def autocast(device: torch.device) -> torch.autocast:
    """Compute in bfloat16 on a GPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_images(cell: Cell, data: Path, device: torch.device) -> Loaded:
    """Return the images of a cell, those that :func:`benchmarks.accuracy.training.open_images` would."""
    recipe = cell.recipe
    images, labels, tests, test_labels, classes = load_images(data / FOLDERS[cell.dataset], recipe.image_size, device)
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED)).to(device)
    cut = len(images) // VALIDATION if cell.split == "validation" else 0
    if cut:
        held_out = shuffled[:cut][:MEASURED]
        tests, test_labels = images[held_out], labels[held_out]
    kept = shuffled[cut:][: recipe.images]
    return images[kept], labels[kept], tests, test_labels, classes


@cache
def load_images(folder: Path, image_size: int, device: torch.device) -> Loaded:
    """Read a data set.

    Images to train on are as large as what is cropped from them: the files of both data sets are no larger than the
    images of the full recipes.
    """
    splits = open_data(folder, image_size=image_size, resize_size=image_size, augment="none")
    return *read(splits.train, device), *read(splits.val, device), splits.classes


def read(images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """Read all images, bytes (N, 3, S, S), and their labels (N)."""
    with ThreadPoolExecutor() as pool:
        pixels, labels = zip(*pool.map(images.__getitem__, range(len(images))), strict=True)
    return torch.stack(pixels).to(device), torch.tensor(labels, device=device)


def make_batches(images: Tensor, labels: Tensor, recipe: Recipe, seed: int, epoch: int) -> list[tuple[Tensor, Tensor]]:
    """Shuffle, augment and normalise the images of an epoch, and return its batches: a function of seed and epoch."""
    generator = torch.Generator(images.device).manual_seed(hash((seed, epoch)))
    size = min(recipe.batch_size, len(images))
    order = torch.randperm(len(images), generator=generator, device=images.device)[: len(images) // size * size]
    seen = normalise(augment(images[order], recipe.augment, generator)).contiguous(memory_format=layout(images.device))
    return [*zip(seen.split(size), labels[order].split(size), strict=True)]


def augment(images: Tensor, how: Literal["imagenet", "small"], generator: torch.Generator) -> Tensor:
    """Crop ("imagenet") or shift ("small") each of the images, bytes (B, 3, S, S), at random, and mirror half of them.

    Drawn as by torchvision's RandomResizedCrop, RandomCrop and RandomHorizontalFlip, but for all images at once.
    """
    draw, outside = {"imagenet": (draw_crops, "border"), "small": (draw_shifts, "zeros")}[how]
    sides, centres = draw(len(images), images.shape[-1], generator)
    mirrored = torch.randint(2, (len(images),), generator=generator, device=images.device)
    sides[:, 0] *= 1 - 2 * mirrored
    places = torch.cat([sides.diag_embed(), centres[..., None]], dim=2)
    grid = F.affine_grid(places, [*images.shape], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode=outside, align_corners=False).round().byte()


def draw_crops(count: int, _size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw width and height of crops as shares of the image's, and x and y of their centres from -1 to 1, (B, 2) each.

    Of several tries the first is taken that fits into the image.
    """
    device = generator.device
    area, skew = torch.rand(2, TRIES, count, generator=generator, device=device)
    area, ratio = MIN_SCALE + (1 - MIN_SCALE) * area, RATIO ** (2 * skew - 1)
    tried = torch.stack([area * ratio, area / ratio], dim=-1).sqrt()
    first = (tried <= 1).all(-1).byte().argmax(0)
    sides = tried[first, torch.arange(count, device=device)].clamp(max=1)
    centres = (1 - sides) * (2 * torch.rand(count, 2, generator=generator, device=device) - 1)
    return sides, centres


def draw_shifts(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw shifts by whole pixels, up to an eighth of the side, in the form of :func:`draw_crops`."""
    reach, device = size // 8, generator.device
    pixels = torch.randint(-reach, reach + 1, (count, 2), generator=generator, device=device)
    return torch.ones(count, 2, device=device), pixels * (2 / size)
