"""The index of a set of shards: which image stands where, in JSON that is checked on reading."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from odconv.system.files import write_text

FORMAT = "odconv shards"
VERSION = 1
LISTS = ("labels", "offsets", "lengths", "crc32")
SAFE_NAME = re.compile(r"(?!\.)[\w .+=@,-]+(/(?!\.)[\w .+=@,-]+)*")
"""Relative, and nowhere outside its folder: no "..", no hidden name, no drive, no scheme, no backslash."""


@dataclass(frozen=True, eq=False)
class Shard:
    """A tar file of images.

    `file` is relative to the index, with "/" between folders; sizes and places are in bytes. Of each image there are
    class index, where it begins, length and checksum (N,). `unreadable` names the members that are no image, or a
    damaged one.
    """

    file: str
    size: int
    sha256: str
    labels: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    crc32: np.ndarray
    unreadable: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        head = {"file": self.file, "images": len(self.labels), "bytes": self.size, "sha256": self.sha256}
        lists = {name: getattr(self, name).tolist() for name in LISTS}
        return {**head, "unreadable": self.unreadable, **lists}

    @classmethod
    def from_json(cls, values: Any) -> "Shard":
        """Check plain values; a ValueError says why they do not describe a shard."""
        if not isinstance(values, dict) or not isinstance(file := values.get("file"), str):
            raise ValueError("a shard has no file name")
        if not SAFE_NAME.fullmatch(file):
            raise ValueError(f"file must be a plain name within the folder of the index, got {file!r}")
        images, size, sha256 = _count(file, values, "images"), _count(file, values, "bytes"), str(values.get("sha256"))
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"{file}: sha256 must be 64 hexadecimal digits, got {sha256!r}")
        labels, offsets, lengths, crc32 = (_numbers(file, name, values.get(name), images) for name in LISTS)
        if (lengths > size).any() or (offsets > size - lengths).any():
            raise ValueError(f"{file} has an image that ends behind its {size} bytes")
        if not _is_names(unreadable := values.get("unreadable", [])):
            raise ValueError(f"{file}: unreadable must be a list of names")
        return cls(file, size, sha256, labels, offsets, lengths, crc32, unreadable)


@dataclass(frozen=True)
class Index:
    """A set of shards, in order, and the names of the classes; a label is an index into these.

    `fingerprint` is of the images and options that the set was packed from; empty where it was not packed here.
    """

    classes: list[str]
    shards: list[Shard]
    fingerprint: str = ""

    def write(self, path: Path) -> None:
        """Write a JSON file, whole or not at all."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "images": sum(len(shard.labels) for shard in self.shards),
            "fingerprint": self.fingerprint,
            "classes": self.classes,
        }
        lines = ",\n".join(json.dumps(shard.to_json(), separators=(",", ":")) for shard in self.shards)
        write_text(path, f'{json.dumps(head)[:-1]}, "shards": [\n{lines}\n]}}\n')

    @classmethod
    def parse(cls, text: bytes, place: str | Path) -> "Index":
        """Read an index; a ValueError, which names its place, if it is none of this version, or contradicts itself."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is no index of shards: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f'{place} is no index of shards: it has no "format": "{FORMAT}"')
        if values.get("version") != VERSION:
            raise ValueError(f"{place} is an index of version {values.get('version')!r}; this odconv reads {VERSION}")
        classes, shards = values.get("classes"), values.get("shards")
        if not _is_names(classes) or not classes:
            raise ValueError(f"{place}: classes must be a list of names")
        if not isinstance(shards, list) or not shards:
            raise ValueError(f"{place}: shards must be a list of shards")
        try:
            index = cls(classes, [Shard.from_json(shard) for shard in shards], str(values.get("fingerprint", "")))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if len({shard.file for shard in index.shards}) < len(shards):
            raise ValueError(f"{place} names a shard twice")
        if (highest := max(max(shard.labels) for shard in index.shards)) >= len(classes):
            raise ValueError(f"{place}: label {highest} has no name among its {len(classes)} classes")
        return index


def _is_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(name, str) for name in values)


def _count(file: str, values: dict[str, Any], name: str) -> int:
    if type(value := values.get(name)) is not int or not 0 < value < 2**62:
        raise ValueError(f"{file}: {name} must be a whole number above 0, got {value!r}")
    return value


def _numbers(file: str, name: str, values: Any, length: int) -> np.ndarray:
    numbers = np.array(values) if isinstance(values, list) and set(map(type, values)) == {int} else np.array(["no"])
    if numbers.dtype != np.int64 or len(numbers) != length or numbers.min() < 0:
        raise ValueError(f"{file}: {name} must be {length} whole numbers from 0")
    return numbers
