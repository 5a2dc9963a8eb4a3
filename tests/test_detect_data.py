"""COCO's data and scores: what is read, what is refused, what is drawn from it, and formulas for the scores."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from odconv.app.detect.coco import Annotations, check_files, read_annotations
from odconv.app.detect.images import UNREADABLE, CocoImages, RandomPart, collate
from odconv.app.detect.masks import decode_masks
from odconv.app.detect.sampler import GroupedSampler
from odconv.app.detect.scores import METRICS, describe_detections, score

Content = dict[str, list[dict]]
SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]


def content() -> Content:
    """Two images, the first with a square of each class; ids with gaps."""
    square = {"bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0, "segmentation": SQUARE}
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 3, "file_name": "sub/b.png", "width": 40, "height": 60},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, **square},
            {"id": 2, "image_id": 7, "category_id": 90, **square},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    def write(what: object) -> Path:
        path = tmp_path / "instances.json"
        path.write_text(what if isinstance(what, str) else json.dumps(what))
        return path

    return write


def changed(**annotation: object) -> Content:
    """The second square is another one."""
    what = content()
    what["annotations"][1] |= annotation
    return what


def as_detections(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ground truth as what a perfect detector would say."""
    found = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
    return found | ({"masks": target["masks"][:, None].float()} if "masks" in target else {})


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_truth_scores_100(shared_data: Path, split: str) -> None:
    root = shared_data / "coco-mini"
    annotations = read_annotations(root / f"annotations/instances_{split}2017.json", masks=True)
    assert annotations.describe_dropped() == ""
    assert any(item["iscrowd"] for objects in annotations.objects for item in objects)
    check_files(annotations, root / f"{split}2017")
    images = CocoImages(annotations, root / f"{split}2017", "none", masks=True)
    categories, results = [item["id"] for item in annotations.categories], []
    for (_, target), entry in zip((images[i] for i in range(len(images))), annotations.images, strict=True):
        results += describe_detections(as_detections(target), entry["id"], categories)
    scores = score(annotations, results, [entry["id"] for entry in annotations.images], masks=True)
    classes = scores.pop("classes")
    assert scores == {prefix + name: 100.0 for prefix in ("", "mask_") for name in METRICS}
    assert len(classes) == 80
    assert all(value == {"ap": 100.0, "mask_ap": 100.0} for value in classes.values())


def found(*boxes: tuple[int, list[float], float], image: int = 7) -> list[dict]:
    """Detections of category, box (x, y, width, height) and score, with the box as the mask."""
    results = []
    for category, box, value in boxes:
        x, y, width, height = box
        mask = np.zeros((40, 60, 1), dtype=np.uint8, order="F")
        mask[int(y) : int(y + height), int(x) : int(x + width)] = 1
        rle = coco_masks.encode(mask)[0]
        item = {"image_id": image, "category_id": category, "bbox": box, "score": value}
        results.append(item | {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}})
    return results


def test_scores_by_hand(write) -> None:
    annotations = read_annotations(write(content()), masks=True)
    results = found((5, [10, 10, 18, 16], 0.9), (90, [10, 10, 20, 20], 0.5), (90, [30, 30, 5, 5], 0.6))
    scores = score(annotations, results, [7, 3], masks=True)
    # the cat overlaps by 0.72: found at 5 of 10 thresholds. The dog comes second: precision 1/2
    for prefix in ("", "mask_"):
        assert scores["classes"]["cat"][f"{prefix}ap"] == 50.0
        assert scores["classes"]["dog"][f"{prefix}ap"] == 50.0
        assert scores[f"{prefix}ap50"] == 75.0
        assert scores[f"{prefix}ap75"] == 25.0
        assert scores[f"{prefix}ap_small"] == scores[f"{prefix}ap"]
        assert scores[f"{prefix}ap_large"] is None


def test_images_that_were_not_looked_at_do_not_count(write) -> None:
    annotations = read_annotations(write(changed(image_id=3)))
    cat = found((5, [10, 10, 20, 20], 0.9))
    assert score(annotations, cat, [7, 3])["ap"] == 50.0
    assert score(annotations, cat, [7])["ap"] == 100.0
    assert score(annotations, [], [7])["ap"] == 0.0


def test_nothing_found_in_a_crowd_is_wrong(write) -> None:
    crowd = {"size": [40, 60], "counts": [10 * 40, 20 * 40, 30 * 40]}  # columns 10 to 29
    what = changed(iscrowd=1, category_id=5, segmentation=crowd, bbox=[10, 0, 20, 40])
    annotations = read_annotations(write(what), masks=True)
    (_, target) = make_images(annotations, write)[0]
    assert target["boxes"].tolist() == [[10, 10, 30, 30]]
    results = found((5, [10, 10, 20, 20], 0.5), (5, [12, 0, 10, 10], 0.9))
    assert score(annotations, results, [7, 3], masks=True)["mask_ap"] == 100.0
    what["annotations"][1]["iscrowd"] = 0
    assert score(read_annotations(write(what), masks=True), results, [7, 3], masks=True)["mask_ap"] < 60.0


def make_images(annotations: Annotations, write, augment="none") -> CocoImages:
    folder = write("").parent / "images"
    for entry in annotations.images:
        path = folder / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (entry["width"], entry["height"]), "red").save(path)
    check_files(annotations, folder)
    return CocoImages(annotations, folder, augment, masks=True)


def test_labels_count_from_1_in_the_order_of_ids(write) -> None:
    annotations = read_annotations(write(content()), masks=True)
    assert annotations.classes == ["cat", "dog"]
    images = make_images(annotations, write)
    image, target = images[0]
    assert image.shape == (3, 40, 60)
    assert image.dtype == torch.uint8
    assert target["labels"].tolist() == [1, 2]
    assert target["boxes"].tolist() == [[10, 10, 30, 30]] * 2
    assert target["masks"].shape == (2, 40, 60)
    assert target["masks"].sum() == 2 * 400
    assert target["masks"][:, 10:30, 10:30].all()
    _, empty = images[1]  # an image without objects is kept
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 60, 40)
    batch, targets = collate([images[0], images[1]])
    assert [image.shape for image in batch] == [(3, 40, 60), (3, 60, 40)]
    assert len(annotations.without_empty().images) == len(targets) - 1


def test_some_classes_alone(write) -> None:
    annotations = read_annotations(write(content()), ["dog"])
    assert annotations.labels == {90: 1}
    assert [len(objects) for objects in annotations.objects] == [1, 0]
    assert annotations.dropped == {}
    with pytest.raises(ValueError, match=r"has no 'dogs'; did you mean dog\?"):
        read_annotations(write(content()), ["dogs"])


def test_masks_of_all_kinds_are_alike(write) -> None:
    mask = np.zeros((40, 60, 1), dtype=np.uint8, order="F")
    mask[10:30, 10:30] = 1
    compressed = coco_masks.encode(mask)[0]
    runs = np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=0, append=0))
    counts = np.diff([0, *runs, mask.size]).tolist()
    kinds = [SQUARE, {"size": [40, 60], "counts": counts}]
    kinds.append({"size": [40, 60], "counts": compressed["counts"].decode()})
    decoded = decode_masks(kinds, 40, 60)
    assert (decoded == torch.from_numpy(mask[None, ..., 0])).all()
    path = write({**content(), "annotations": [changed(segmentation=kind)["annotations"][1] for kind in kinds]})
    assert len(read_annotations(path, masks=True).objects[0]) == 3


NAN = float("nan")


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"bbox": [10, 10, 0, 5]}, "with a box of zero or negative size"),
        ({"bbox": [10, 10, 5, -1]}, "with a box of zero or negative size"),
        ({"bbox": [60, 10, 5, 5]}, "with a box outside of the image"),
        ({"bbox": [-9, 10, 9, 5]}, "with a box outside of the image"),
        ({"bbox": [10, NAN, 5, 5]}, "with a box that is not finite"),
        ({"bbox": [10, 10, math.inf, 5]}, "with a box that is not finite"),
        ({"bbox": [10, 10, 5]}, "without a box"),
        ({"bbox": None}, "without a box"),
        ({"bbox": [10, 10, "5", 5]}, "without a box"),
        ({"image_id": 8}, "of images that are not listed"),
        ({"category_id": 6}, "of categories that are not listed"),
        ({"segmentation": []}, "without a mask"),
        ({"segmentation": [[1, 1, 2, 2]]}, "without a polygon of three points"),
        ({"segmentation": "mask"}, "neither polygons nor RLE"),
        ({"segmentation": [[500, 500, 510, 500, 510, 510]]}, "without a polygon of three points or more in the image"),
        ({"segmentation": [[0, 0, 1e9, 1e9, 0, 1e9]]}, "with a mask whose outline is longer than 1,000,000 pixels"),
        (
            {"segmentation": [*SQUARE, [0, 0, 30, 30] * 20_000]},
            "with a mask whose outline is longer than 1,000,000 pixels",
        ),
        ({"segmentation": [[10**400] * 6]}, "without a polygon of three points"),
        ({"bbox": [0, 0, 10**400, 10**400]}, "without a box"),
        ({"segmentation": {"size": [40, 60], "counts": [5, 5]}}, "with an RLE that cannot be decoded"),
        ({"segmentation": {"size": [40, 60], "counts": None}}, "with an RLE that cannot be decoded"),
        ({"segmentation": {"size": [40, 60], "counts": "zzzzzzzz"}}, "with an RLE that cannot be decoded"),
        ({"segmentation": {"size": [40, 60], "counts": [2400]}}, "without a mask"),
        ({"segmentation": {"size": 5, "counts": [2400]}}, "of another size than the image"),
        ({"iscrowd": "yes"}, "whose iscrowd is neither 0 nor 1"),
        ({"image_id": [7]}, "of images that are not listed"),
        ({"category_id": [5]}, "of categories that are not listed"),
        ({"segmentation": {"size": [60, 40], "counts": [2400]}}, "of another size than the image"),
    ],
)
def test_what_cannot_be_learned_is_left_out_counted_and_named(write, annotation: dict, reason: str) -> None:
    annotations = read_annotations(write(changed(**annotation)), masks=True)
    assert [item["category_id"] for item in annotations.objects[0]] == [5]
    assert len(annotations.images) == 2
    assert re.fullmatch(rf"left out of .*: 1 .*{reason}.* \(ids 2\)", annotations.describe_dropped())
    if "segmentation" in annotation:
        assert len(read_annotations(write(changed(**annotation))).objects[0]) == 2, "boxes alone need no masks"


@pytest.mark.parametrize("masks", [True, False])
def test_objects_on_images_too_large_to_be_read_are_left_out(write, masks: bool) -> None:
    """Whose masks would take 10 GB each."""
    what = content()
    what["images"][0] |= {"width": 10**5, "height": 10**5}
    for item in what["annotations"]:
        item["image_id"] = what["images"][0]["id"]
        item["segmentation"] = {"size": [10**5, 10**5], "counts": [0, 10**10]}
    annotations = read_annotations(write(what), masks=masks)
    count = len(what["annotations"])
    assert f"{count} of images that are listed as too large to be read" in annotations.describe_dropped()
    assert not any(annotations.objects)


def test_a_bad_polygon_does_not_cost_the_mask(write) -> None:
    annotations = read_annotations(write(changed(segmentation=[[1, 1, 2, 2], *SQUARE])), masks=True)
    assert annotations.objects[0][1]["segmentation"] == SQUARE


def without(part: str, place: str | None = None) -> Content:
    what = content()
    if place is None:
        del what[part]
    else:
        del what[part][0][place]
    return what


def with_image(**entry: object) -> Content:
    what = content()
    what["images"][0] |= entry
    return what


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 10**5, "is no JSON"),
        (with_image(width=10**400), r"the image a\.png in .* pixels"),
        ("[]", "has no list of images .* it holds a list"),
        (without("images"), "has no list of images; it holds annotations, categories"),
        (without("annotations"), "has no list of annotations"),
        (without("categories"), "has no list of categories"),
        ({**content(), "images": []}, "lists no images"),
        ({**content(), "annotations": [1]}, "annotations in the annotation file .* must be a list of objects"),
        ({**content(), "categories": [], "annotations": []}, "lists no categories"),
        (without("images", "file_name"), "image 0 in .* has no file_name"),
        (without("images", "width"), "image 0 in .* has no width"),
        (with_image(width=60.5), r"the image a\.png in .* is 60\.5 x 40 pixels"),
        (with_image(height=NAN), r"the image a\.png in .* is 60 x nan pixels"),
        (with_image(width=math.inf), r"the image a\.png in .* is inf x 40 pixels"),
        (with_image(file_name=7), "the file_name of image 0 in .* must be a string, got 7"),
        (with_image(id=[7]), "the id of image 0 in .* must be a number or a string"),
        ({**content(), "images": content()["images"] * 2}, "two images in .* have the id 7"),
        ({**content(), "categories": content()["categories"] * 2}, "two categories in .* have the id 90"),
        ({**content(), "categories": [{"id": 1}]}, "a category in .* has no id, a whole number, or no name"),
    ],
)
def test_files_that_are_none(write, what: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_annotations(write(what))


def test_masks_are_asked_for_and_there_are_none(write) -> None:
    what = content()
    for item in what["annotations"]:
        item["segmentation"] = []
    with pytest.raises(ValueError, match=r"Mask R-CNN needs masks, and .* has none; faster_rcnn needs boxes alone"):
        read_annotations(write(what), masks=True)


def test_files_that_are_missing(write, tmp_path: Path) -> None:
    path = write(content())
    with pytest.raises(FileNotFoundError, match=r"does not exist; did you mean instances\.json"):
        read_annotations(path.with_name("instance.json"))
    annotations = read_annotations(path, masks=True)
    with pytest.raises(FileNotFoundError, match=r"the folder of images .* does not exist"):
        check_files(annotations, tmp_path / "pictures")
    images = make_images(annotations, write)
    (images.folder / "sub" / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images listed in .* are not in .*: sub/b\.png"):
        check_files(annotations, images.folder)


def test_a_folder_that_is_a_link(write, tmp_path: Path) -> None:
    images = make_images(read_annotations(write(content()), masks=True), write)
    (images.folder / "sub").rename(tmp_path / "elsewhere")
    (images.folder / "sub").symlink_to(tmp_path / "elsewhere")
    check_files(images.annotations, images.folder)


@pytest.mark.parametrize("ids", [("a", "b"), (2**60, 2**60 + 1), (0, "0"), (0.5, -3), (0, -1)])
def test_ids_of_images_may_be_anything(write, ids: tuple) -> None:
    what = changed(image_id=ids[1], iscrowd=None, area=None)
    what["annotations"][0]["image_id"] = ids[0]
    for entry, number in zip(what["images"], ids, strict=True):
        entry |= {"id": number, "width": 60.0, "height": 40}
    annotations = read_annotations(write(what), masks=True)
    results = found((5, [10, 10, 20, 20], 0.9), image=ids[0]) + found((90, [10, 10, 20, 20], 0.9), image=ids[1])
    assert score(annotations, results, ids, masks=True)["mask_ap"] == 100.0
    assert score(annotations, results, ids[:1])["classes"] == {"cat": {"ap": 100.0}, "dog": {"ap": None}}
    assert decode_masks([annotations.objects[0][0]["segmentation"]], 40, annotations.images[0]["width"]).sum() == 400


def test_label_0_stands_for_nothing() -> None:
    detections = {"boxes": torch.ones(3, 4), "labels": torch.tensor([0, 1, 2]), "scores": torch.ones(3)}
    assert [item["category_id"] for item in describe_detections(detections, 7, [5, 90])] == [5, 90]
    assert [item["category_id"] for item in describe_detections(detections, 7, [5, None])] == [5]


@pytest.mark.parametrize("classes", [(), "cat"])
def test_classes_are_names(write, classes: object) -> None:
    with pytest.raises(ValueError, match="classes must be names of categories"):
        read_annotations(write(content()), classes)


def test_everything_was_left_out_and_why(write) -> None:
    what = content()
    for item in what["annotations"]:
        item["image_id"] = str(item["image_id"])
    with pytest.raises(ValueError, match=r"no image with an object to find; left out of .*: 2 of images that are not"):
        read_annotations(write(what)).without_empty()


def test_nothing_to_learn(write) -> None:
    with pytest.raises(ValueError, match="has no image with an object to find"):
        read_annotations(write({**content(), "annotations": []})).without_empty()


@pytest.mark.parametrize("fault", ["text", "size"])
def test_an_image_that_cannot_be_read(write, caplog, fault: str) -> None:
    images = make_images(read_annotations(write(content()), masks=True), write)
    path = images.folder / "a.png"
    if fault == "text":
        path.write_text("no image")
    else:
        Image.new("RGB", (40, 60)).save(path)
    image, target = images[0]
    assert target["index"] == UNREADABLE
    assert len(target["boxes"]) == len(target["masks"]) == 0
    assert image.shape[0] == 3
    assert "a.png" in caplog.text
    assert ("40 x 60 pixels, and 60 x 40 by its annotations" in caplog.text) == (fault == "size")
    assert images[len(images)][1]["index"] == UNREADABLE


@pytest.mark.parametrize("augment", ["flip", "strong", "crop"])
def test_boxes_and_masks_move_with_the_image(shared_data: Path, augment: str) -> None:
    root = shared_data / "coco-mini"
    annotations = read_annotations(root / "annotations/instances_train2017.json", masks=True)
    images = CocoImages(annotations, root / "train2017", augment, masks=True)
    flipped = 0
    for i in range(12):
        image, target = images[i, 1000 + i]
        assert target["masks"].shape[1:] == image.shape[1:]
        assert len(target["labels"]) == len(target["boxes"]) == len(target["masks"])
        again = images[i, 1000 + i]
        assert (image == again[0]).all(), "a function of the seed"
        assert (target["boxes"] == again[1]["boxes"]).all()
        boxes = target["boxes"]
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 1).all()
        if augment == "flip":
            original, truth = CocoImages(annotations, root / "train2017", "none", masks=True)[i]
            mirrored = not (image == original).all()
            flipped += mirrored
            assert (image == (original.flip(-1) if mirrored else original)).all()
            assert (target["masks"] == (truth["masks"].flip(-1) if mirrored else truth["masks"])).all()
            for box, mask in zip(boxes, target["masks"], strict=True):
                _, columns = mask.nonzero(as_tuple=True)
                assert columns.min() >= box[0] - 1.5
                assert columns.max() <= box[2] + 1.5
    assert augment != "flip" or 0 < flipped < 12


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), least=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_random_part_is_of_the_image_and_of_everything_on_it(size: tuple[int, int], least: int, seed: int) -> None:
    image = torch.arange(math.prod(size)).view(1, *size)
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([[0, 0, *size[::-1]]]), format="XYXY", canvas_size=size),
        "masks": tv_tensors.Mask(image.clone()),
    }
    torch.manual_seed(seed)
    part, found = RandomPart(least, least + 20)(tv_tensors.Image(image), target)
    part, mask = part.as_subclass(Tensor), found["masks"].as_subclass(Tensor)
    height, width = part.shape[1:]
    for side, whole in zip((height, width), size, strict=True):
        assert min(whole, least) <= side <= min(whole, least + 20)
    top, left = divmod(int(part[0, 0, 0]), size[1])
    assert part.equal(image[:, top : top + height, left : left + width])
    assert mask.equal(part)
    assert found["boxes"].tolist() == [[0, 0, width, height]]


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 1), min_size=1, max_size=40),
    batch=st.integers(1, 5),
    world=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_batches_are_of_one_shape(groups: list[int], batch: int, world: int, epoch: int) -> None:
    samplers = [GroupedSampler(groups, batch, 7, rank, world) for rank in range(world)]
    orders = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler)
        assert len(order) % batch == 0
        orders.append([index for index, _ in order])
        sampler.go_to(epoch, batch)
        assert list(sampler) == order[batch:]
    assert {index for order in orders for index in order} == {*range(len(groups))}
    for start in range(0, len(orders[0]), batch):
        in_step = [groups[index] for order in orders for index in order[start : start + batch]]
        assert len({*in_step}) == 1
    seen = sum(map(len, orders))
    kinds = len({*groups})
    assert seen < len(groups) + kinds * batch * world
