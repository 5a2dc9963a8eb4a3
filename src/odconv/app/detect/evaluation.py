"""Measuring a detector."""

from pathlib import Path
from typing import Any, Literal

from odconv.app.engine.config import Amp, check
from odconv.system.files import check_writable, write_json
from odconv.system.text import first_few, number, printable


def evaluate(
    *,
    weights: str,
    data: str,
    images: str = "val2017",
    annotations: str = "annotations/instances_val2017.json",
    test_batch: int = 8,
    workers: int | None = None,
    amp: Amp = "none",
    devices: int | Literal["auto"] = "auto",
    skip_corrupt: bool = False,
    out: str | None = None,
    **detector: Any,
) -> dict[str, Any]:
    """Measure the average precision of a detector, as COCO does.

    Args:
        weights: A checkpoint of odconv detect train, which says what detector it is, or another file of a detector.
        data: Folder of a data set in COCO's format, to which the two below are relative.
        images: Folder of the images.
        annotations: Annotations of the images.
        test_batch: Images in a step, over all processes.
        workers: Processes that read images; default: by the number of CPU cores, at most 8.
        amp: Mixed precision: none, bf16 or fp16.
        devices: GPUs or CPU processes; auto: all GPUs, else one process.
        skip_corrupt: Leave out images that cannot be read, instead of failing.
        out: Folder for scores.json and for what was found, in COCO's format: bbox.json, and segm.json for masks.
        **detector: What the checkpoint does not say; see :func:`odconv.app.detect.restore.restore`.

    Returns:
        ap, ap50, ap75, ap_small, ap_medium, ap_large (in %), for masks the same with "mask_" before them, classes with
        the ap of each, images, corrupt, seconds.

    Raises:
        ValueError: an option, or weights, or classes that do not fit, or a corrupt image, or no image that can be read.
        OSError: weights or data cannot be read, or `out` cannot be written.
    """
    from odconv.app.detect.coco import check_files, read_annotations
    from odconv.app.detect.images import CocoImages, collate
    from odconv.app.detect.module import DetectorEvaluation
    from odconv.app.detect.restore import restore
    from odconv.app.engine.loaders import evaluation_loader
    from odconv.app.engine.trainer import make_trainer

    check({"test_batch": test_batch, "workers": workers, "devices": devices})
    trainer = make_trainer(devices, amp, logger=False, enable_checkpointing=False, benchmark=False)
    if out and trainer.is_global_zero:
        check_writable(Path(out))
    restored = restore(weights, **detector)
    evaluation = DetectorEvaluation(restored.model)
    truth = read_annotations(Path(data, annotations), restored.chosen, evaluation.masks)
    check_files(truth, Path(data, images))
    ids = {category["name"]: category["id"] for category in truth.categories}
    if unknown := sorted({*ids} - {*restored.classes}):
        raise ValueError(f"the data has classes that the detector does not know: {first_few(unknown)}")
    evaluation.annotations, evaluation.categories = truth, [ids.get(name) for name in restored.classes]
    place = {"rank": trainer.global_rank, "world_size": trainer.world_size}
    found = CocoImages(truth, Path(data, images))
    loader = evaluation_loader(found, test_batch, workers, **place, collate_fn=collate)
    trainer.validate(evaluation, loader, verbose=False)
    looked_at = int(trainer.callback_metrics["val_images"])
    corrupt = len(truth.images) - looked_at
    if corrupt and not skip_corrupt:
        raise ValueError(f"{corrupt} of {len(truth.images)} images cannot be read; skip_corrupt leaves them out")
    result = {
        "detector": restored.name,
        **evaluation.scores,
        "images": looked_at,
        "corrupt": corrupt,
        "seconds": evaluation.seconds,
    }
    if trainer.is_global_zero:
        print(*filter(None, [truth.describe_dropped()]), _table(restored.name, result), sep="\n", flush=True)
        if out:
            _write(Path(out), result, evaluation.results)
    return result


def _table(name: str, result: dict[str, Any]) -> str:
    """Return the scores as lines of text."""
    from odconv.app.detect.scores import METRICS

    columns = ("AP", "AP50", "AP75", "small", "medium", "large")
    lines = [
        f"{name}: {result['images']} images in {result['seconds']:.1f} s",
        " " * 24 + "".join(f"{column:>8}" for column in columns),
    ]
    for prefix, title in (("", "boxes"), ("mask_", "masks")):
        if prefix + "ap" in result:
            lines.append(f"{title:24}" + "".join(f"{number(result[prefix + metric]):>8}" for metric in METRICS))
    titles = ["boxes", "masks"] if "mask_ap" in result else ["boxes"]
    lines.append(f"{'AP by class':24}" + "  ".join(f"{title:>6}" for title in titles))
    for title, scores in result["classes"].items():
        if scores["ap"] is not None:
            lines.append(f"  {printable(title):22}" + "  ".join(f"{number(value):>6}" for value in scores.values()))
    return "\n".join(lines)


def _write(out: Path, result: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Write the scores, and what was found in the files that COCO's server takes."""
    files: dict[str, Any] = {"scores": result}
    files["bbox"] = [{key: value for key, value in item.items() if key != "segmentation"} for item in found]
    if "mask_ap" in result:
        files["segm"] = [{key: value for key, value in item.items() if key != "bbox"} for item in found]
    for name, content in files.items():
        write_json(out / f"{name}.json", content, indent=2 if name == "scores" else None)
