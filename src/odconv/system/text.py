"""Numbers and names as people read them."""

import difflib
from collections.abc import Iterable
from math import isfinite, isnan
from typing import Any

UNKNOWN = "-"


def printable(text: Any) -> str:
    """Text as it can be printed: control characters, but for the ends of lines, and what is no text are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))


def number(value: Any, digits: int = 2, unit: str = "") -> str:
    """Return a number with some digits after the point, and its unit; a dash for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or isnan(value):
        return UNKNOWN
    return f"{value:,.{digits}f}{unit}"


def share(value: Any) -> str:
    """Return a share of 1 in %."""
    return number(100 * value, 1, " %") if isinstance(value, int | float) else UNKNOWN


def duration(seconds: float) -> str:
    """Seconds as "4.5 s", "3 min 20 s" or "2 h 5 min"."""
    if not isfinite(seconds):
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {round(seconds) % 60} s"


def count(many: int, what: str) -> str:
    """Return a number of things: "1 epoch", "2 epochs"."""
    return f"{many:,} {what}{'s' * (many != 1)}"


def first_few(texts: Iterable[Any], separator: str = ", ", none: str = "none") -> str:
    """Join at most eight texts, and say how many more there are; `none` stands for no text."""
    texts = [*map(str, texts)]
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    return (printable(separator.join(texts[:8])) or none) + more


def suggest(name: str, known: Iterable[str], otherwise: str = "", most: int = 1, cutoff: float = 0.6) -> str:
    """Return "; did you mean ...?" with the known names that are near a name, or else `otherwise`.

    Args:
        name: what is not known.
        known: what is.
        otherwise: what to return where no name is near.
        most: names at most.
        cutoff: least similarity, as difflib has it.
    """
    near = difflib.get_close_matches(name, [*known], n=most, cutoff=cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else otherwise
