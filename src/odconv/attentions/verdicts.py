"""What the statistics of attentions say, in words."""

from collections.abc import Sequence
from math import isnan
from statistics import median
from typing import Any, NamedTuple

from odconv.system.text import count

Row = dict[str, Any]

VARIES, SAME = 0.05, 0.01
"""Deviation between images, as a share of the mean, from which an attention varies, and below which it does not."""

DIFFER = 0.2
"""Distance of kernels from which they differ: twice that of a warm start, a fifth of that of unrelated ones."""

KINDS = ("channel", "filter", "spatial", "kernel")
VERDICTS = ("varies with the image", "varies slightly", "the same for every image", "not a number")


class Summary(NamedTuple):
    """An attention over all of its layers: medians over them, and how many of them get each verdict."""

    attention: str
    mean: float
    deviation: float
    between_entries: float
    saturated: float
    verdict: str


def deviation(row: Row) -> float:
    """Return the deviation between images as a share of the mean."""
    return row["between_images"] / row["mean"] if row["mean"] else 0.0


def verdict(row: Row) -> str:
    """Say whether an attention of a layer depends on the image."""
    share = deviation(row)
    if isnan(share):
        return VERDICTS[3]
    return VERDICTS[0 if share >= VARIES else 1 if share >= SAME else 2]


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Sum up the rows of an epoch, one summary an attention."""
    summaries = []
    for kind in KINDS:
        of_kind = [row for row in rows if row["attention"] == kind]
        if not of_kind:
            continue
        given = [verdict(row) for row in of_kind]
        phrases = [
            f"{word} in {'all ' * (given.count(word) == len(given) > 1)}{count(given.count(word), 'layer')}"
            for word in VERDICTS
            if word in given
        ]
        summaries.append(
            Summary(
                kind,
                median(row["mean"] for row in of_kind),
                median(deviation(row) for row in of_kind),
                median(row["between_entries"] for row in of_kind),
                median(row["saturated"] for row in of_kind),
                ", ".join(phrases),
            )
        )
    return summaries


def judge_kernels(rows: Sequence[Row]) -> str | None:
    """Say whether the kernels of the layers differ, and how they are mixed; None where each layer has one."""
    mixed = [row for row in rows if not isnan(row["kernel_distance"])]
    if not mixed:
        return None
    differ = sum(row["kernel_distance"] >= DIFFER for row in mixed)
    distance, entropy = (median(row[column] for row in mixed) for column in ("kernel_distance", "entropy"))
    return (
        f"The kernels differ in {differ} of {len(mixed)} layers: in the median layer their distance is {distance:.2f}, "
        f"where 0 means equal and 1 unrelated. The entropy of their mixture is {entropy:.2f} there, where 0 means one "
        "kernel alone and 1 equal shares."
    )
