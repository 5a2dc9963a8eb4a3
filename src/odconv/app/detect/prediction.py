"""Finding objects on images: pictures with boxes, labels and masks, and a file of all that was found."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odconv.app.engine.config import check
from odconv.system.devices import Device, find_device
from odconv.system.files import check_writable, replacing, write_json
from odconv.system.text import printable

COLOURS = ("#e41a1c", "#377eb8", "#2f9e44", "#984ea3", "#e8590c", "#0b7285", "#a65628", "#d6336c", "#5c7cfa", "#868e96")
"""Of boxes and masks, by class; the label is white on them."""


def predict(
    images: list[str], *, weights: str, out: str, threshold: float = 0.5, device: Device = "auto", **detector: Any
) -> dict[str, Any]:
    """Find objects on images: draw them, and write them to a file.

    Args:
        images: Files, folders, or patterns such as 'photos/*.jpg'.
        weights: A checkpoint of odconv detect train, which says what detector it is, or another file of a detector.
        out: Folder for the pictures, and for detections.json, in COCO's format.
        threshold: Score above which an object is drawn and written, from 0 to 1.
        device: Where to compute: cpu, gpu, or auto for a GPU if there is one.
        **detector: What the checkpoint does not say; see :func:`odconv.app.detect.restore.restore`.

    Returns:
        What is in detections.json: `images` with their files, `annotations` with the objects found, `categories`.
        Files that cannot be read are named and left out.

    Raises:
        ValueError: an option or weights that do not fit, or no image at all can be read.
        OSError: the weights cannot be read, or `out` cannot be written.
    """
    from torchvision.io import encode_png
    from torchvision.ops import box_area
    from torchvision.transforms.v2.functional import pil_to_tensor

    from odconv.app.data import readable_images
    from odconv.app.detect.restore import restore
    from odconv.app.detect.scores import describe_detections

    check({"threshold": threshold})
    check_writable(Path(out))
    place = find_device(device)
    detector.setdefault("score_threshold", min(threshold, 0.05))
    restored = restore(weights, **detector)
    names = dict(zip(restored.categories, restored.classes, strict=True))
    model = restored.model.to(place)
    found: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }
    for number, (path, image) in enumerate(readable_images(images), 1):
        pixels = pil_to_tensor(image)
        with torch.inference_mode():
            (detections,) = model([pixels.to(place) / 255])
        wanted = (detections["scores"] > threshold) & (detections["labels"] > 0)  # 0 stands for nothing
        detections = {name: values[wanted].cpu() for name, values in detections.items()}
        objects = describe_detections(detections, number, restored.categories)
        picture = Path(out) / f"{number:04}_{path.stem}.png"
        entry = {"id": number, "file_name": str(path), "width": image.width, "height": image.height}
        found["images"].append(entry | {"picture": picture.name})
        masks = detections.get("masks")
        areas = box_area(detections["boxes"]) if masks is None else (masks >= 0.5).sum((1, 2, 3))
        found["annotations"] += [item | {"area": area} for item, area in zip(objects, areas.tolist(), strict=True)]
        with replacing(picture) as partial:
            partial.write_bytes(encode_png(draw(pixels, detections, restored.classes)).numpy().tobytes())
        lines = (f"{100 * item['score']:6.1f} %  {printable(names[item['category_id']])}" for item in objects)
        print(printable(path), *lines, sep="\n  ")
    if not found["images"]:
        raise ValueError("none of the images can be read")
    for i, item in enumerate(found["annotations"], 1):
        item |= {"id": i, "iscrowd": 0}
    write_json(Path(out) / "detections.json", found, indent=None)
    print(f"{len(found['annotations'])} objects on {len(found['images'])} images: {out}", flush=True)
    return found


def draw(image: Tensor, detections: dict[str, Tensor], classes: list[str]) -> Tensor:
    """Draw what was found on an image, bytes (3, H, W), with labels and scores; the first class has the label 1."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    labels = detections["labels"].tolist()
    if not labels:
        return image
    colours = [COLOURS[(label - 1) % len(COLOURS)] for label in labels]
    if "masks" in detections:
        image = draw_segmentation_masks(image, detections["masks"][:, 0] >= 0.5, alpha=0.45, colors=colours)
    scores = detections["scores"].tolist()
    texts = [f"{classes[label - 1]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    width = max(2, round(max(image.shape) / 320))
    return draw_bounding_boxes(
        image, detections["boxes"], texts, colours, width=width, label_colors="white", fill_labels=True
    )
