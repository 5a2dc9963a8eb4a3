"""Names of classes."""

from collections.abc import Sequence
from pathlib import Path

from odconv.app.data import imagenet_names


def class_names(file: str | None, known: Sequence[str] | None, outputs: int) -> list[str]:
    """Name the outputs of a network: by a text file with a name a line, or by names that the weights come with.

    ImageNet's folders, which are called by WordNet ids, get their readable names, and so do 1,000 outputs without any
    names. Those without a name are numbered. It is a ValueError if the file has another number of lines, or is no text.
    """
    if file is not None:
        try:
            known = Path(file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"classes must be a text file in UTF-8, got {file}") from error
        if len(known) != outputs:
            raise ValueError(f"classes must be a file of {outputs} lines, one an output, but {file} has {len(known)}")
    elif outputs == 1000 and (not known or known[0] == "n01440764"):
        known = imagenet_names()
    known = list(known or [])[:outputs]
    return known + [f"class {i}" for i in range(len(known), outputs)]
