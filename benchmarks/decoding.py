"""Images a second on one core: reading, decoding and augmenting a training image, and an evaluation image.

    python benchmarks/decoding.py --sample ../shared/data/imagenet-sample --imagenette ../shared/data/imagenette96

Files: the sample of ImageNet as it is (short side 256), enlarged to the size of typical ImageNet files (short side 375)
in two qualities and to that of large ones (short side 1200), and Imagenette of 96 pixels. Enlarged images hold less
detail, hence fewer bytes, than photographs of that size: `kilobytes` says how many.

Ways, from a file to what the loader's process hands over:

    pil                    Pillow, v2 transforms on its images, every image normalised
    pil draft              the same, decoded at 1/2, 1/4 or 1/8 where the cut-out keeps as many pixels as the result
    pil bytes              without normalising: a whole batch is normalised later, on the device; as odconv evaluates
    simplejpeg             simplejpeg's decoder, v2 transforms on tensors of bytes, every image normalised
    simplejpeg in place    the same, normalised in place
    simplejpeg bytes       without normalising; as odconv trains
    torchvision bytes, torchcodec bytes    other decoders, where they are installed
    opencv bytes           OpenCV's decoder and its own resize (INTER_AREA), where it is installed

Times are those of the process (not of the clock), the ways taken in turns; medians over the rounds. `mean_difference`
and `largest_difference` compare the bytes with those of "pil" for the same random numbers, in steps of 1/255. The
`step` rows take "pil" and "simplejpeg" apart. The `loader` rows are the time of a worker of a DataLoader, with batches
put together in shared memory.
"""

import argparse
import io
import math
import random
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
import torchvision
from common import RESULTS, origin, percentiles, write_rows
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from odconv.app.data import open_data

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 32
IN_LOADER = ("pil", "simplejpeg", "simplejpeg in place", "simplejpeg bytes")
Way = Callable[[str], Tensor]


def enlarge(files: list[str], short: int, quality: int, folder: Path) -> list[str]:
    """Write the images again with that short side."""
    folder.mkdir()
    written = []
    for i, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        scale = short / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        image.save(folder / f"{i}.jpg", quality=quality)
        written.append(str(folder / f"{i}.jpg"))
    return written


def read_pil(file: str) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def read_simplejpeg(file: str) -> Tensor:
    return torch.from_numpy(simplejpeg.decode_jpeg(Path(file).read_bytes())).permute(2, 0, 1)


def other_readers() -> dict[str, Callable[[str], Tensor]]:
    readers: dict[str, Callable[[str], Tensor]] = {}
    if hasattr(torchvision.io, "decode_jpeg"):  # deprecated since torchvision 0.29
        readers["torchvision"] = lambda file: torchvision.io.decode_jpeg(torch.from_numpy(np.fromfile(file, np.uint8)))
    with suppress(ImportError, RuntimeError):
        from torchcodec import decoders

        readers["torchcodec"] = lambda file: decoders.decode_jpeg(Path(file).read_bytes())
    return readers


class Pipelines:
    """Every way, for training (`train`) or evaluation, to `size` pixels."""

    def __init__(self, train: bool, size: int, resize: int) -> None:
        self.train, self.size, self.short = train, size, resize
        self.crop, self.flip = v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()
        self.cut = v2.Compose([self.crop, self.flip] if train else [v2.Resize(resize), v2.CenterCrop(size)])
        self.to_bytes, self.to_float = v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)
        self.normalise, self.normalise_in_place = v2.Normalize(MEAN, STD), v2.Normalize(MEAN, STD, inplace=True)

    def ways(self) -> dict[str, Way]:
        return {
            "pil": lambda file: self.normalise(self.to_float(self.pil_bytes(file))),
            "pil draft": lambda file: self.normalise(self.to_float(self.draft_bytes(file))),
            "pil bytes": self.pil_bytes,
            "simplejpeg": lambda file: self.normalise(self.to_float(self.simplejpeg_bytes(file))),
            "simplejpeg in place": lambda file: self.normalise_in_place(self.to_float(self.simplejpeg_bytes(file))),
            "simplejpeg bytes": self.simplejpeg_bytes,
            **{f"{name} bytes": lambda file, read=read: self.cut(read(file)) for name, read in other_readers().items()},
            **self.opencv(),
        }

    def byte_ways(self) -> dict[str, Way]:
        """What differs in its bytes from "pil bytes"."""
        return {"pil draft": self.draft_bytes, "simplejpeg bytes": self.simplejpeg_bytes, **self.opencv()}

    def pil_bytes(self, file: str) -> Tensor:
        return self.to_bytes(self.cut(read_pil(file)))

    def simplejpeg_bytes(self, file: str) -> Tensor:
        return self.cut(read_simplejpeg(file))

    def draft_bytes(self, file: str) -> Tensor:
        with Image.open(file) as image:
            width, height = image.size
            if not self.train:
                least = self.short / min(width, height)
                image.draft("RGB", (math.ceil(width * least), math.ceil(height * least)))
                return self.to_bytes(self.cut(image.convert("RGB")))
            part = self.crop.make_params([image])
            image.draft(
                "RGB", (math.ceil(width * self.size / part["width"]), math.ceil(height * self.size / part["height"]))
            )
            x, y = image.width / width, image.height / height
            left, top = part["left"] * x, part["top"] * y
            box = (left, top, left + part["width"] * x, top + part["height"] * y)
            drafted = image.convert("RGB")
        if (x, y) == (1, 1):  # as v2 does it: cut out, then resize
            drafted, box = drafted.crop(tuple(map(round, box))), None
        return self.to_bytes(self.flip(drafted.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)))

    def opencv(self) -> dict[str, Way]:
        try:
            import cv2
        except ImportError:
            return {}
        cv2.setNumThreads(1)

        def by_opencv(file: str) -> Tensor:
            pixels = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR_RGB)
            height, width = pixels.shape[:2]
            if self.train:
                part = self.crop.make_params([torch.empty(3, height, width, device="meta")])
                top, left = part["top"], part["left"]
                pixels = pixels[top : top + part["height"], left : left + part["width"]]
                pixels = cv2.resize(pixels, (self.size, self.size), interpolation=cv2.INTER_AREA)
                return self.flip(torch.from_numpy(pixels).permute(2, 0, 1)).contiguous()
            scale = self.short / min(height, width)
            pixels = cv2.resize(pixels, (int(width * scale), int(height * scale)), interpolation=cv2.INTER_AREA)
            return v2.functional.center_crop(torch.from_numpy(pixels).permute(2, 0, 1), self.size).contiguous()

        return {"opencv bytes": by_opencv}

    def steps(self, files: list[str]) -> dict[str, list[Callable[[], Any]]]:
        """The parts of "pil" and "simplejpeg", each on what the part before it leaves."""
        cut = self.crop if self.train else self.cut
        parts: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {}
        data = [np.fromfile(file, np.uint8) for file in files]
        parts["read"] = (lambda file: np.fromfile(file, np.uint8), files)
        for way, decode in (
            ("pil", lambda encoded: Image.open(io.BytesIO(encoded)).convert("RGB")),
            ("simplejpeg", lambda encoded: torch.from_numpy(simplejpeg.decode_jpeg(encoded)).permute(2, 0, 1)),
        ):
            decoded = [decode(encoded) for encoded in data]
            small = [cut(image) for image in decoded]
            whole = [self.to_bytes(image) for image in small]
            floats = [self.to_float(image) for image in whole]
            parts[f"{way}: decode"] = (decode, data)
            parts[f"{way}: crop and resize"] = (cut, decoded)
            if self.train:
                parts[f"{way}: flip half of them"] = (self.flip, small)
            if way == "pil":
                parts["pil: to tensor"] = (self.to_bytes, small)
            parts[f"{way}: to float"] = (self.to_float, whole)
            parts[f"{way}: normalise"] = (self.normalise, floats)
        batch = torch.stack(whole[:BATCH])
        runs = {name: [lambda f=f, x=x: f(x) for x in given] for name, (f, given) in parts.items()}
        runs[f"to float and normalise in place, a batch of {BATCH}, per image"] = [
            lambda: self.normalise_in_place(self.to_float(batch)),
            *[lambda: None] * (BATCH - 1),
        ]
        return runs


def in_turns(runs: dict[str, list[Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a call, of this process, over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, calls in runs.items():
            torch.manual_seed(0)
            before = time.process_time()
            for call in calls:
                call()
            if turn:  # the first one warms up
                times[name].append(1e3 * (time.process_time() - before) / len(calls))
    return {name: percentiles(values) for name, values in times.items()}


def differences(way: Way, base: Way, files: list[str]) -> dict[str, float]:
    """By how much the bytes differ for the same random numbers, and in how many of the images."""
    means, largest = [], []
    for i, file in enumerate(files):
        torch.manual_seed(i)
        expected = base(file).int()
        torch.manual_seed(i)
        difference = (way(file).int() - expected).abs()
        means.append(difference.float().mean().item())
        largest.append(int(difference.max()))
    changed = sum(value > 0 for value in largest) / len(files)
    return {
        "mean_difference": round(mean(means), 3),
        "largest_difference": max(largest),
        "images_changed": round(changed, 3),
    }


class Repeated(Dataset[Tensor]):
    """The files by one way, over and over."""

    def __init__(self, files: list[str], way: Way, length: int) -> None:
        self.files, self.way, self.length = files, way, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return self.way(self.files[index % len(self.files)])


def in_a_worker(files: list[str], way: Way, batches: int = 20) -> float:
    """Milliseconds an image of a DataLoader's one worker, without those of its start."""

    def seconds(batches: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in DataLoader(Repeated(files, way, batches * BATCH), BATCH, num_workers=1):
            pass
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return 1e3 * (seconds(batches + 1) - seconds(1)) / (batches * BATCH)


def measure(files: list[str], size: int, resize: int, rounds: int, loader: bool) -> list[dict[str, Any]]:
    rows = []
    sizes = [Image.open(file).size for file in files]
    about = {
        "files": len(files),
        "megapixels": round(mean(width * height for width, height in sizes) / 1e6, 3),
        "kilobytes": round(mean(Path(file).stat().st_size for file in files) / 1e3, 1),
        "size": size,
    }
    for train in (True, False):
        pipelines = Pipelines(train, size, resize)
        keys = about | {"mode": "training" if train else "evaluation"}
        runs = {name: [lambda w=w, f=f: w(f) for f in files] for name, w in pipelines.ways().items()}
        measured = in_turns(runs, rounds)
        compared = {name: differences(way, pipelines.pil_bytes, files) for name, way in pipelines.byte_ways().items()}
        for name, values in measured.items():
            rows.append(keys | {"kind": "whole", "way": name, **values, **compared.get(name, {})})
        for name, values in in_turns(pipelines.steps(files), rounds).items():
            rows.append(keys | {"kind": "step", "way": name, **values})
        if loader:
            ways = pipelines.ways()
            turns = [{name: in_a_worker(files, ways[name]) for name in IN_LOADER} for _ in range(3)]
            for name in IN_LOADER:
                rows.append(keys | {"kind": "loader", "way": name, **percentiles([turn[name] for turn in turns])})
        for row in rows:
            row.setdefault("images_per_second", round(1e3 / row["median_ms"]))
            base = next(
                (r for r in rows if r["way"] == "pil" and (r["kind"], r["mode"]) == (row["kind"], row["mode"])), None
            )
            if base and row["kind"] != "step":
                row.setdefault("times_pil", round(base["median_ms"] / row["median_ms"], 2))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", required=True, help="folder of the sample of ImageNet")
    parser.add_argument("--imagenette", required=True, help="folder of Imagenette")
    parser.add_argument("--files", type=int, default=96, help="images of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding.csv", help="CSV to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(0)

    def some(data: str) -> list[str]:
        return chance.sample(list(open_data(data, need_train=False).val.sources), args.files)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sample = some(args.sample)
        kinds = {
            "sample": (sample, 224, 256, args.rounds, False),
            "short side 375, quality 90": (enlarge(sample, 375, 90, Path(folder, "a")), 224, 256, args.rounds, False),
            "short side 375, quality 98": (enlarge(sample, 375, 98, Path(folder, "b")), 224, 256, args.rounds, True),
            "short side 1200, quality 90": (
                enlarge(sample[:32], 1200, 90, Path(folder, "c")),
                224,
                256,
                args.rounds,
                False,
            ),
            "imagenette96": (some(args.imagenette), 96, 96, args.rounds, False),
        }
        for name, given in kinds.items():
            for row in measure(*given):
                rows.append({"images": name} | row)
                if row["kind"] != "step":
                    print(
                        f"{name:28s} {row['mode']:10s} {row['kind']:6s} {row['way']:22s} {row['median_ms']:7.3f} ms "
                        f"{row['images_per_second']:5d}/s  {row.get('times_pil', '')}",
                        flush=True,
                    )
    versions = {
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
        "torchvision": torchvision.__version__,
    }
    write_rows(args.out, [row | origin() | versions for row in rows])


if __name__ == "__main__":
    main()
