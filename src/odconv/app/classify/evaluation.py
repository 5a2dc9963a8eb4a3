"""Measuring the accuracy of a checkpoint."""

from pathlib import Path
from typing import Any, Literal

from odconv.app.classify.restore import Restored, restore
from odconv.app.engine.config import Amp, check
from odconv.system.files import check_writable, write_json
from odconv.system.text import first_few


def evaluate(
    *,
    weights: str,
    data: str,
    test_batch: int = 100,
    workers: int | None = None,
    amp: Amp = "none",
    devices: int | Literal["auto"] = "auto",
    skip_corrupt: bool = False,
    out: str | None = None,
    **network: Any,
) -> dict[str, Any]:
    """Measure the accuracy of a checkpoint.

    Args:
        weights: A checkpoint of odconv train, or a folder of odconv release or its name, which say what network it is;
            or another file of weights.
        data: Folder with val/ (or an archive of it), folder of CIFAR-10, or the word digits.
        test_batch: Images in a step, over all processes.
        workers: Processes that read images; default: by the number of CPU cores, at most 8.
        amp: Mixed precision: none, bf16 or fp16.
        devices: GPUs or CPU processes; auto: all GPUs, else one process.
        skip_corrupt: Leave out images that cannot be read, instead of failing.
        out: JSON file to write the result to.
        **network: What the checkpoint does not say; see :func:`odconv.app.classify.restore.restore`.

    Returns:
        top1 and top5 (in %), loss, images, corrupt, seconds.

    Raises:
        ValueError: an option, or weights, or classes that do not fit, or a corrupt image, or no image that can be read.
        OSError: weights or data cannot be read, or `out` cannot be written.
    """
    from odconv.app.classify.module import ClassifierEvaluation
    from odconv.app.data import open_data
    from odconv.app.engine.loaders import evaluation_loader
    from odconv.app.engine.trainer import make_trainer

    check({"test_batch": test_batch, "workers": workers, "devices": devices})
    trainer = make_trainer(devices, amp, logger=False, enable_checkpointing=False)
    if out and trainer.is_global_zero:
        check_writable(Path(out).parent)
        if Path(out).is_dir():
            raise IsADirectoryError(f"out must be a file, got the folder {out}")
    restored = restore(weights, **network)
    splits = open_data(data, image_size=restored.image_size, resize_size=restored.resize_size, need_train=False)
    outputs = _outputs_of_classes(splits.classes, restored)
    splits.val.labels = [outputs[label] for label in splits.val.labels]
    loader = evaluation_loader(splits.val, test_batch, workers, rank=trainer.global_rank, world_size=trainer.world_size)
    evaluation = ClassifierEvaluation(restored.model)
    trainer.validate(evaluation, loader, verbose=False)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    images = int(metrics["val_images"])
    corrupt = len(splits.val) - images
    if corrupt and not skip_corrupt:
        raise ValueError(f"{corrupt} of {len(splits.val)} images cannot be read; skip_corrupt leaves them out")
    result = {
        "arch": restored.arch,
        "top1": metrics["val_top1"],
        "top5": metrics["val_top5"],
        "loss": metrics["val_loss"],
        "images": images,
        "corrupt": corrupt,
        "seconds": evaluation.seconds,
    }
    if trainer.is_global_zero:
        print(
            f"{restored.arch}: top-1 {result['top1']:.2f} %   top-5 {result['top5']:.2f} %   "
            f"loss {result['loss']:.4f}   {images} images in {evaluation.seconds:.1f} s"
            + (f", {corrupt} corrupt ones left out" if corrupt else ""),
            flush=True,
        )
        if out:
            write_json(Path(out), result)
    return result


def _outputs_of_classes(classes: list[str], network: Restored) -> list[int]:
    """Return which output of the network stands for each class of the data."""
    if network.classes is None:
        if len(classes) != network.num_classes:
            raise ValueError(f"the data has {len(classes)} classes, the network {network.num_classes} outputs")
        return list(range(len(classes)))
    if unknown := sorted({*classes} - {*network.classes}):
        raise ValueError(f"the data has classes that the network does not know: {first_few(unknown)}")
    return [network.classes.index(name) for name in classes]
