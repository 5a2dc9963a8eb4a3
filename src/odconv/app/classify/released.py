"""A folder of weights, as `odconv release` and :class:`odconv.hub.HubModel` write them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odconv.app.engine.config import check
from odconv.checkpoints import SUFFIXES as CHECKPOINTS
from odconv.checkpoints import malformed
from odconv.system.files import EXPORTED

if TYPE_CHECKING:
    from odconv.hub import HubModel

NOTES = "classifier.json"
"""What a released classifier is given and answers: image_size, resize_size, classes (the names of their folders), and
names (what they are called) if these say it better. Folders of HubModel lack it."""


def open_released(folder: Path) -> "tuple[HubModel, dict[str, Any]]":
    """Open a folder of weights: the network, which knows what builds it, and what is in NOTES.

    A FileNotFoundError or ValueError says what is missing, malformed or does not fit.
    """
    from odconv.hub import CONFIG, WEIGHTS, HubModel

    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        files = sorted(file.name for file in folder.iterdir() if file.name.endswith((*CHECKPOINTS, *EXPORTED)))
        hint = f"; did you mean {' or '.join(str(folder / name) for name in files[:3])}?" if files else ""
        raise FileNotFoundError(f"the folder {folder} has no {' and no '.join(missing)}{hint}")
    with malformed(folder / CONFIG):
        model = HubModel.from_pretrained(folder)
    notes = read_notes(folder / NOTES, model.config["num_classes"]) if (folder / NOTES).is_file() else {}
    return model, notes


def read_notes(path: Path, outputs: int) -> dict[str, Any]:
    """Read NOTES of a network with so many outputs; a ValueError says what is malformed."""
    with malformed(path):
        notes = json.loads(path.read_text(encoding="utf-8"))
        found = {name: notes[name] for name in ("image_size", "resize_size", "classes")}
        check(found)
        if not all(isinstance(name, str) for name in found["classes"]) or len(found["classes"]) > outputs:
            raise ValueError(f"{path} is malformed: classes must be at most {outputs} names, got {found['classes']!r}")
        if names := notes.get("names"):
            if not all(isinstance(name, str) for name in names) or len(names) != len(found["classes"]):
                raise ValueError(f"{path} is malformed: names must be {len(found['classes'])} names, got {names!r}")
            found["names"] = names
    return found
