"""Every form of data set gives the same kind of items, and bad data is named."""

import hashlib
import io
import logging
import multiprocessing
import os
import pickle
import tarfile
import tempfile
import zipfile
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchvision")

from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from odconv.app.data import (
    IGNORE,
    EvaluationSampler,
    evaluation_transform,
    find_images,
    imagenet_names,
    normalise,
    open_data,
    read_image,
    read_pixels,
    sort_validation,
    training_transform,
)
from odconv.app.data.archives import unpack

SMALL = {"image_size": 16, "resize_size": 16}


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def make_split(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            picture(10 * label + i).save(folder / name / f"{i}.jpg")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_split(tmp_path / "data" / "train")
    make_split(tmp_path / "data" / "val", each=2)
    return tmp_path / "data"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ODCONV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- forms of data sets


def test_folder(folder: Path) -> None:
    splits = open_data(folder, image_size=24, resize_size=28)
    assert splits.classes == ["cat", "dog"]
    assert splits.train is not None
    assert [label for _, label in splits.train] == [0, 0, 0, 1, 1, 1]
    assert [label for _, label in splits.val] == [0, 0, 1, 1]
    for image, _ in [*splits.train, *splits.val]:
        assert type(image) is torch.Tensor
        assert image.shape == (3, 24, 24)
        assert image.dtype == torch.uint8


def test_evaluation_needs_only_val(folder: Path, tmp_path: Path) -> None:
    splits = open_data(folder, need_train=False, **SMALL)
    assert splits.train is None
    make_split(tmp_path / "other" / "test")
    assert len(open_data(tmp_path / "other", need_train=False, **SMALL).val) == 6


def test_digits_are_stratified_and_the_same_every_time() -> None:
    first, second = open_data("digits", augment="none", **SMALL), open_data("digits", augment="none", **SMALL)
    assert first.classes == [str(digit) for digit in range(10)]
    assert first.train is not None
    assert second.train is not None
    assert (len(first.train), len(first.val)) == (1437, 360)
    assert np.bincount(first.val.labels).min() >= 34
    for a, b in [(first.train, second.train), (first.val, second.val)]:
        assert np.array_equal(a.sources, b.sources)
        assert np.array_equal(a.labels, b.labels)
    image, label = first.val[0]
    assert isinstance(label, int)
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[1])
    assert image.min() == 0
    assert image.max() > 0.9 * 255


@pytest.mark.parametrize("augment", ["imagenet", "small"])
def test_digits_are_never_flipped(augment: str, folder: Path) -> None:
    def transforms(data: str | Path) -> list[type]:
        splits = open_data(data, augment=augment, **SMALL)
        assert splits.train is not None
        return [type(step) for step in splits.train.transform.transforms]

    assert v2.RandomHorizontalFlip not in transforms("digits")
    assert v2.RandomHorizontalFlip in transforms(folder)


def make_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Write CIFAR-10's files with 20 images each, and tell torchvision their checksums."""
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(name: str, content: dict) -> str:
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    images = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    batch = {"data": images.reshape(20, -1), "labels": [i % 10 for i in range(20)]}
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = {"filename": "batches.meta", "key": "label_names"}
    for attribute in ("train_list", "test_list"):
        files = [name for name, _ in getattr(CIFAR10, attribute)]
        monkeypatch.setattr(CIFAR10, attribute, [[name, write(name, batch)] for name in files])
    monkeypatch.setattr(CIFAR10, "meta", meta | {"md5": write("batches.meta", {"label_names": names})})
    return images


def test_cifar10_as_torchvision_downloads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_cifar10(tmp_path, monkeypatch)
    size = {"image_size": 32, "resize_size": 32}
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        splits = open_data(path, augment="none", **size)
        assert splits.train is not None
        assert (len(splits.train), len(splits.val)) == (100, 20)
        assert (splits.classes[0], splits.classes[9]) == ("airplane", "truck")
        image, label = splits.val[3]
        assert label == 3
        assert torch.equal(image, torch.from_numpy(images[3]))
    assert open_data(tmp_path, need_train=False, **size).train is None
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is incomplete or damaged"):
        open_data(tmp_path, need_train=False)


# --- archives


def pack(folder: Path, archive: Path, prefix: str = "") -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in files:
                file.write(path, prefix + path.relative_to(folder).as_posix())
    else:
        with tarfile.open(archive, f"w:{archive.suffix.removeprefix('.tar')[1:]}") as tar:
            for path in files:
                tar.add(path, prefix + path.relative_to(folder).as_posix())


@pytest.mark.parametrize("prefix", ["", "val/"], ids=["classes", "split"])
@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.xz", ".tar.gz", ".tar.bz2"])
def test_archives(suffix: str, prefix: str, folder: Path, cache: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    pack(folder / "val", packed / f"val{suffix}", prefix)
    a, b = open_data(folder, need_train=False, **SMALL), open_data(packed, need_train=False, **SMALL)
    assert a.classes == b.classes
    for (image, label), (other, other_label) in zip(a.val, b.val, strict=True):
        assert label == other_label
        assert torch.equal(image, other)
    assert all(Path(path).is_relative_to(cache) for path in b.val.sources)
    assert list(packed.iterdir()) == [packed / f"val{suffix}"]


def test_a_changed_archive_is_unpacked_anew(folder: Path, cache: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    for classes in (["cat"], ["cat", "dog"]):
        with tarfile.open(packed / "val.tar", "w") as tar:
            for name in classes:
                tar.add(folder / "val" / name, name)
        assert open_data(packed, need_train=False, **SMALL).classes == classes
    folders = [path for path in cache.iterdir() if path.is_dir()]
    stamps = [path.stat().st_mtime_ns for path in folders]
    open_data(packed, need_train=False, **SMALL)
    assert [path.stat().st_mtime_ns for path in folders] == stamps
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def unpack_with_others(archive: Path, cache: Path, barrier: Barrier) -> None:
    barrier.wait()
    folder = unpack(archive, cache)
    assert len(list(folder.rglob("*.jpg"))) == 400


def test_several_processes_unpack_at_once(tmp_path: Path) -> None:
    make_split(tmp_path / "many", tuple(f"class{i}" for i in range(10)), each=40)
    archive, cache = tmp_path / "val.tar.xz", tmp_path / "cache"
    pack(tmp_path / "many", archive)
    context = multiprocessing.get_context("fork")  # all at the same moment, without waiting for imports
    arguments = (archive, cache, context.Barrier(4))
    processes = [context.Process(target=unpack_with_others, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [path for path in cache.iterdir() if path.is_dir()] == [unpack(archive, cache)]


def evil_tar(path: Path, name: str, link: str | None = None) -> None:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo(name)
        if link:
            info.type, info.linkname = tarfile.SYMTYPE, link
        info.size = 0 if link else 4
        tar.addfile(info, io.BytesIO(b"evil"))


@pytest.mark.parametrize("name", ["../../evil.jpg", "cat/../../../evil.jpg", "/evil.jpg"])
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_archives_cannot_write_elsewhere(suffix: str, name: str, cache: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    if suffix == ".zip":
        with zipfile.ZipFile(packed / "val.zip", "w") as file:
            file.writestr(name, "evil")
    else:
        evil_tar(packed / "val.tar", name)
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(cache)}
    # of an absolute name tar's own filter strips the slash
    with pytest.raises((ValueError, FileNotFoundError), match=r"damaged or unsafe|holds no class folders"):
        open_data(packed, need_train=False)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(cache)} == before
    assert not Path("/evil.jpg").exists()


def test_links_out_of_an_archive_are_refused(cache: Path, tmp_path: Path) -> None:
    evil_tar(tmp_path / "val.tar", "cat", link="/etc")
    with pytest.raises(ValueError, match=r"val\.tar is damaged or unsafe"):
        open_data(tmp_path, need_train=False)


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.xz", ".tar.gz", ".tar.bz2"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_damaged_archives_leave_nothing_behind(
    suffix: str, share: float, folder: Path, cache: Path, tmp_path: Path
) -> None:
    archive = tmp_path / f"val{suffix}"
    pack(folder / "val", archive)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * share)] or b"no archive")
    with pytest.raises(ValueError, match=f"val{suffix} is damaged or unsafe"):
        open_data(tmp_path, need_train=False)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@given(share=st.floats(0, 0.999))
def test_a_tar_cut_anywhere_is_damaged(share: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_split(folder / "val", each=1)
        pack(folder / "val", archive := folder / "val.tar")
        with tarfile.open(archive) as tar:
            tar.getmembers()
            end = tar.offset
        os.truncate(archive, int(share * end))
        with pytest.raises(ValueError, match=r"val\.tar is damaged"):
            unpack(archive, folder / "cache")


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    pack(folder / "val", tmp_path / "val.tar")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"into the cache folder .*file.*\$ODCONV_CACHE"):
        open_data(tmp_path, need_train=False, cache=tmp_path / "file" / "cache")


# --- transforms


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (256, 256), (30, 20)])
def test_evaluation_is_that_of_torchvision(size: tuple[int, int]) -> None:
    image = picture(size=size)
    reference = v1.Compose(
        [
            v1.Resize(256),
            v1.CenterCrop(224),
            v1.ToTensor(),
            v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    torch.testing.assert_close(normalise(evaluation_transform()(image)), reference(image))
    torch.testing.assert_close(evaluation_transform(112)(image), evaluation_transform(112, 128)(image))


@pytest.mark.parametrize("augment", ["imagenet", "small", "none"])
def test_augmentation(augment: str) -> None:
    transform = training_transform(32, 32, augment, min_scale=0.5)
    images = {transform(picture(size=(48, 32))).numpy().tobytes() for _ in range(8)}
    assert len(images) == 1 if augment == "none" else len(images) > 4


def test_min_scale_is_the_smallest_area() -> None:
    # a horizontal ramp: the range of values that survives tells the width of the part cut out
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    whole = training_transform(64, 64, min_scale=1.0)
    small = training_transform(64, 64, min_scale=0.01)

    def span(image: torch.Tensor) -> float:
        return float(image[0].max() - image[0].min()) / 255

    assert min(span(whole(ramp)) for _ in range(20)) > 0.7
    assert min(span(small(ramp)) for _ in range(50)) < 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": 224, "resize_size": 200}, "resize_size must be at least image_size = 224, got 200"),
        ({"augment": "strong"}, "augment must be one of imagenet, randaugment, small, none, got 'strong'"),
        ({"min_scale": 0.0}, "min_scale must be above 0 and at most 1, got 0.0"),
        ({"min_scale": 1.5}, "min_scale must be above 0 and at most 1, got 1.5"),
    ],
)
def test_bad_options(options: dict, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_data(folder, **options)


# --- images


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    colour = picture()
    alpha = Image.new("L", colour.size, 0)
    grey16 = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
    clear = colour.copy()
    clear.putalpha(alpha)
    clear_palette = Image.new("P", colour.size, 0)
    clear_palette.putpalette([255, 0, 0])
    white, grey = Image.new("RGB", colour.size, "white"), colour.convert("L").convert("RGB")
    cases = {
        "rgb.png": (colour, {}, colour),
        "grey.png": (colour.convert("L"), {}, grey),
        "bilevel.png": (colour.convert("1"), {}, colour.convert("1").convert("RGB")),
        "palette.png": (colour.convert("P"), {}, colour.convert("P").convert("RGB")),
        "clear.png": (clear, {}, white),
        "greyalpha.png": (clear.convert("LA"), {}, white),
        "clearpalette.png": (clear_palette, {"transparency": 0}, white),
        "clearpalette.gif": (clear_palette, {"transparency": 0}, white),
        "grey16.png": (grey16, {}, grey),
        "grey16.tiff": (grey16, {}, grey),
    }
    for name, (image, options, expected) in cases.items():
        image.save(tmp_path / name, **options)
        read = read_image(tmp_path / name)
        assert read.mode == "RGB", name
        assert np.array_equal(np.asarray(read), np.asarray(expected)), name
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    difference = np.asarray(read_image(tmp_path / "cmyk.jpg")).astype(int) - np.asarray(colour)
    assert np.abs(difference).mean() < 8


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "bomb":  # a header that claims 60000 x 60000 pixels
        path.write_bytes(b"P6 60000 60000 255\n")
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no image"}[how])


@pytest.mark.parametrize("how", ["missing", "bomb", "truncated", "empty", "text"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".tiff"])
def test_unreadable_images_are_named_and_ignored(
    how: str, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_split(tmp_path / "val")
    bad = tmp_path / "val" / "cat" / f"bad{suffix}"
    picture().save(bad)
    if suffix == ".gif":  # not among the names that folders are searched for
        bad = bad.rename(bad.with_suffix(".png"))
    val = open_data(tmp_path, need_train=False, **SMALL).val
    damage(bad, how)
    with caplog.at_level(logging.WARNING):
        batches = list(DataLoader(val, batch_size=7))
    assert len(batches) == 1
    images, labels = batches[0]
    assert labels.tolist() == [0, 0, 0, IGNORE, 1, 1, 1]
    assert not images[3].any()
    assert [record.getMessage().startswith(f"unreadable image {bad}: ") for record in caplog.records] == [True]


def test_unreadable_images_in_loader_processes(folder: Path) -> None:
    (folder / "val" / "cat" / "0.jpg").write_bytes(b"no image")
    val = open_data(folder, need_train=False, **SMALL).val
    context = multiprocessing.get_context("spawn")  # the data set must survive pickling
    (_, labels), *_ = DataLoader(val, batch_size=4, num_workers=1, multiprocessing_context=context)
    assert labels.tolist() == [IGNORE, 0, 1, 1]


def test_find_images(folder: Path, tmp_path: Path) -> None:
    val = folder / "val"
    (val / "notes.txt").touch()
    (val / "cat" / "._0.jpg").touch()
    odd = tmp_path / "odd.dat"
    picture().save(odd, "png")
    expected = [val / "cat" / "0.jpg", val / "cat" / "1.jpg", val / "dog" / "0.jpg", val / "dog" / "1.jpg"]
    assert find_images([val]) == expected
    assert find_images([str(val / "*" / "0.jpg")]) == expected[::2]
    assert find_images([odd, val / "dog", val / "dog" / "0.jpg"]) == [odd, *expected[2:]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image found at .*empty"):
        find_images([tmp_path / "empty"])
    for missing in ("nothing.jpg", "nothing*.jpg"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            find_images([val, tmp_path / missing])


# --- distributed evaluation


@given(length=st.integers(0, 200), world_size=st.integers(1, 9))
def test_sampler_shares_each_index_once(length: int, world_size: int) -> None:
    samplers = [EvaluationSampler(length, rank, world_size) for rank in range(world_size)]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(sampler) for sampler in samplers} == {-(-length // world_size)}
    indices = sorted(index for share in shares for index in share)
    assert indices[:length] == list(range(length))
    assert set(indices[length:]) <= {length}
    assert len(indices) - length < world_size


def test_padding_does_not_count(folder: Path) -> None:
    val = open_data(folder, need_train=False, **SMALL).val
    loaders = [DataLoader(val, batch_size=2, sampler=EvaluationSampler(len(val), rank, 3)) for rank in range(3)]
    labels = [[label for _, batch in loader for label in batch.tolist()] for loader in loaders]
    assert labels == [[0, 1], [0, IGNORE], [1, IGNORE]]
    with pytest.raises(IndexError):
        val[len(val) + 1]


def test_bad_ranks() -> None:
    with pytest.raises(ValueError, match=r"rank must be in 0 \.\. world_size - 1 = 1, got 2"):
        EvaluationSampler(5, 2, 2)
    with pytest.raises(ValueError, match="length must not be negative"):
        EvaluationSampler(-1)


# --- data sets that are not as they should be


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the data folder .*nowhere does not exist"):
        open_data(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="data must be a folder or the word 'digits', got the file"):
        open_data(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no train/ and no val/ \(or test/\): it holds nothing"):
        open_data(tmp_path / "empty")


def test_missing_splits(folder: Path) -> None:
    (folder / "train").rename(folder / "training")
    with pytest.raises(FileNotFoundError, match=r"has no train/ \(nor an archive.* it holds training, val"):
        open_data(folder)
    with pytest.raises(FileNotFoundError, match=r"has no val/ \(or test/\) \(nor an archive.* it holds cat, dog"):
        open_data(folder / "val", need_train=False)


def test_a_flat_val_folder(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"val holds no class folders$"):
        open_data(tmp_path, need_train=False)
    picture().save(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(FileNotFoundError, match="val holds no class folders; `odconv sort-val` sorts"):
        open_data(tmp_path, need_train=False)


def test_classes_without_images(folder: Path) -> None:
    (folder / "val" / "emu").mkdir()
    (folder / "val" / "emu" / "notes.txt").touch()
    (folder / "val" / ".hidden").mkdir()
    with pytest.raises(FileNotFoundError, match=r"class folders without an image in .*val: emu$"):
        open_data(folder)


def test_classes_that_differ(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(ValueError, match="have different classes; only in the first: dog; only in the second: wolf"):
        open_data(folder)


# --- ImageNet


def test_imagenet_names(shared_data: Path) -> None:
    names = imagenet_names()
    with zipfile.ZipFile(shared_data / "imagenet-sample" / "val.zip") as file:
        files = sorted(name for name in file.namelist() if name.endswith(".jpg"))
    assert len(names) == len(files) == 1000
    theirs = [Path(file).stem.split("_", 1)[1].replace("_", " ").lower() for file in files]
    different = [i for i in range(1000) if names[i].lower() != theirs[i]]
    assert different == [134, 639]  # "crane" and "maillot" name two classes each; torchvision tells them apart


def test_shared_archives(shared_data: Path, cache: Path) -> None:
    splits = open_data(shared_data / "imagenet-sample", need_train=False)
    assert len(splits.val) == len(splits.classes) == 1000
    assert (splits.classes[0], splits.classes[999]) == ("n01440764", "n15075141")
    image, label = splits.val[999]
    assert (image.shape, label) == ((3, 224, 224), 999)
    assert "n15075141" in splits.val.sources[999]


WNIDS = ["n01751748", "n09193705", "n02105855", "n04263257", "n03125729"]
"""Of the first five validation images."""


def make_flat(folder: Path) -> list[str]:
    folder.mkdir()
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 6)]
    for name in names:
        (folder / f"{name}.JPEG").write_text(name)
    return names


def assert_sorted(folder: Path) -> None:
    found = sorted((path.stem, path.parent.name, path.read_text()) for path in folder.glob("*/*"))
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 6)]
    assert found == list(zip(names, WNIDS, names, strict=True))


LABEL_FORMS = {
    "plain": lambda names: [f"{name}.JPEG {wnid}" for name, wnid in zip(names, WNIDS, strict=True)],
    "csv": lambda names: ["image,class", *(f"{name}.JPEG,{wnid}" for name, wnid in zip(names, WNIDS, strict=True))],
    "kaggle": lambda names: [
        "ImageId,PredictionString",
        *(f"{name},{wnid} 85 1 499 272 {wnid} 1 2 3 4" for name, wnid in zip(names, WNIDS, strict=True)),
    ],
    "valprep": lambda names: [
        *(f"mkdir -p {wnid}" for wnid in WNIDS),
        *(f"mv {name}.JPEG {wnid}/" for name, wnid in zip(names, WNIDS, strict=True)),
    ],
    "paths": lambda names: [f"val/{wnid}/{name}.JPEG" for name, wnid in zip(names, WNIDS, strict=True)],
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("form", LABEL_FORMS)
def test_sort_validation(form: str, newline: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, labels = tmp_path / "val", tmp_path / "labels.txt"
    names = make_flat(folder)
    labels.write_bytes((newline.join(LABEL_FORMS[form](names)) + newline).encode())
    sort_validation(folder=str(folder), labels=str(labels))
    assert_sorted(folder)
    assert capsys.readouterr().out.startswith("5 images moved, 0 were in place already: 5 classes in ")
    sort_validation(folder=str(folder), labels=str(labels))
    assert capsys.readouterr().out.startswith("0 images moved, 5 were in place already")


@pytest.mark.parametrize("meta", ["mat", "text"])
def test_sort_validation_with_the_devkit(meta: str, tmp_path: Path) -> None:
    folder, labels = tmp_path / "val", tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    make_flat(folder)
    numbers = [490, 361, 171, 822, 297]  # the devkit's own of these five images
    labels.write_text("".join(f"{number}\n" for number in numbers))
    with pytest.raises(FileNotFoundError, match=r"class numbers need the devkit's meta\.mat"):
        sort_validation(folder=str(folder), labels=str(labels))
    rows = [*zip(numbers, WNIDS, strict=True), (1001, "n00001740")]
    if meta == "mat":
        savemat = pytest.importorskip("scipy.io").savemat
        table = np.array(rows, dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
        savemat(tmp_path / "meta.mat", {"synsets": table})
        sort_validation(folder=str(folder), labels=str(labels))
    else:
        (tmp_path / "meta.txt").write_text("".join(f"{number} {wnid} some words\n" for number, wnid in rows))
        sort_validation(folder=str(folder), labels=str(labels), meta=str(tmp_path / "meta.txt"))
    assert_sorted(folder)


@pytest.mark.parametrize("damage", ["garbage", "other"])
def test_a_bad_devkit_is_named(damage: str, tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    make_flat(tmp_path / "val")
    (tmp_path / "truth.txt").write_text("1\n2\n")
    savemat(tmp_path / "meta.mat", {"other": np.ones(3)})
    if damage == "garbage":
        (tmp_path / "meta.mat").write_bytes(b"\x80 no such thing" * 20)
    with pytest.raises(ValueError, match=r"meta\.mat is not the devkit's meta\.mat, or damaged: "):
        sort_validation(folder=str(tmp_path / "val"), labels=str(tmp_path / "truth.txt"))


def test_labels_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    make_flat(tmp_path / "val")
    labels = tmp_path / "labels.txt"
    with pytest.raises(FileNotFoundError, match=r"the file of labels .*labels\.txt does not exist"):
        sort_validation(folder=str(tmp_path / "val"), labels=str(labels))
    labels.write_bytes(b"\x80\xff")
    with pytest.raises(ValueError, match=r"labels\.txt is no text file"):
        sort_validation(folder=str(tmp_path / "val"), labels=str(labels))


def test_sort_validation_with_links_and_after_a_break(tmp_path: Path) -> None:
    folder, labels, out = tmp_path / "val", tmp_path / "labels.txt", tmp_path / "sorted"
    names = make_flat(folder)
    labels.write_text("\n".join(LABEL_FORMS["plain"](names)))
    sort_validation(folder=str(folder), labels=str(labels), out=str(out))
    assert_sorted(out)
    assert len(list(folder.glob("*.JPEG"))) == 5
    os.unlink(out / WNIDS[2] / f"{names[2]}.JPEG")
    sort_validation(folder=str(folder), labels=str(labels), out=str(out))
    assert_sorted(out)
    (folder / WNIDS[0]).mkdir()
    (folder / f"{names[0]}.JPEG").rename(folder / WNIDS[0] / f"{names[0]}.JPEG")
    sort_validation(folder=str(folder), labels=str(labels))
    assert_sorted(folder)


def test_sort_validation_moves_nothing_unless_all_is_well(tmp_path: Path) -> None:
    folder, labels = tmp_path / "val", tmp_path / "labels.txt"
    names = make_flat(folder)
    lines = LABEL_FORMS["plain"](names)

    def attempt(*lines: str) -> None:
        labels.write_text("\n".join(lines))
        sort_validation(folder=str(folder), labels=str(labels))

    with pytest.raises(ValueError, match=r"1 images in .*val have no label in .*; first: ILSVRC2012_val_00000005"):
        attempt(*lines[:4])
    with pytest.raises(
        FileNotFoundError, match=r"1 of 6 images of .* are not in .*val; first: ILSVRC2012_val_00000006"
    ):
        attempt(*lines, f"ILSVRC2012_val_00000006.JPEG {WNIDS[0]}")
    with pytest.raises(ValueError, match=r"line 3: no WordNet id .* in 'ILSVRC2012_val_00000003\.JPEG 65'"):
        attempt(*lines[:2], "ILSVRC2012_val_00000003.JPEG 65")
    with pytest.raises(ValueError, match="names no image such as ILSVRC2012_val_00000001"):
        attempt("hello")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sort_validation(folder=str(tmp_path / "nowhere"), labels=str(labels))
    assert len(list(folder.glob("*.JPEG"))) == len(list(folder.iterdir())) == 5


# --- the faster reading of JPEG files for training


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


JPEGS = {
    "colour": encode(picture()),
    "grey": encode(picture().convert("L")),
    "CMYK": encode(picture().convert("CMYK")),
    "progressive": encode(picture(), progressive=True),
    "full colour resolution": encode(picture(), subsampling=0),
    "PNG": encode(picture().convert("RGBA"), "PNG"),
    "with garbage inside": encode(picture())[:-2] + bytes(50) + b"\xff\xd9",
}


@pytest.mark.parametrize("kind", JPEGS)
def test_read_pixels_reads_what_read_image_does(kind: str, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(JPEGS[kind])
    expected = v2.functional.pil_to_tensor(read_image(JPEGS[kind]))
    assert expected.shape == (3, 30, 40)
    for source in (JPEGS[kind], tmp_path / "image", str(tmp_path / "image"), expected.permute(1, 2, 0).numpy()):
        pixels = read_pixels(source)
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, expected)


@pytest.mark.parametrize("damaged", [b"", b"text", JPEGS["colour"][:400]], ids=["empty", "no image", "cut"])
def test_read_pixels_refuses_what_read_image_does(damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(damaged)
    with pytest.raises(OSError, match=r"image\.jpg"):
        read_pixels(tmp_path / "image.jpg")
    with pytest.raises(OSError, match="no-such-file"):
        read_pixels("no-such-file.jpg")


def test_read_pixels_leaves_a_bomb_to_pil() -> None:
    bomb = bytearray(encode(Image.new("L", (8, 8))))
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = b"\xff\xff\xff\xff"  # height and width
    with pytest.raises(OSError, match="exceeds limit"):
        read_pixels(bytes(bomb))


def test_photographs_are_read_alike_and_augmented_within_a_rounding(shared_data: Path) -> None:
    transform = training_transform(64)
    with zipfile.ZipFile(shared_data / "imagenet-sample" / "val.zip") as file:
        for i, name in enumerate(sorted(file.namelist())[::50]):
            if name.endswith("/"):
                continue
            image, pixels = read_image(file.read(name)), read_pixels(file.read(name))
            assert torch.equal(v2.functional.pil_to_tensor(image), pixels)
            results = []
            for given in (image, pixels):
                torch.manual_seed(i)
                results.append(transform(given))
            assert (results[0].int() - results[1].int()).abs().max() <= 2


def test_a_batch_is_normalised_as_its_images_are_one_by_one() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    steps = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    assert torch.equal(normalise(images), torch.stack([steps(image) for image in images]))
