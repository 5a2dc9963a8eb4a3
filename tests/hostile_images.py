"""Images that are made to do harm."""

import io

from PIL import Image


def postscript() -> bytes:
    """A drawing that Pillow, asked to, gives to Ghostscript."""
    content = io.BytesIO()
    Image.new("RGB", (9, 9)).save(content, "EPS")
    return content.getvalue()


def progressive(side: int, scans: int) -> bytes:
    """A JPEG of 30 kB whose last scan comes over and over again."""
    content = io.BytesIO()
    Image.new("RGB", (side, side)).save(content, "JPEG", progressive=True)
    start, end = content.getvalue().rindex(b"\xff\xda"), -2
    whole = content.getvalue()
    return whole[:start] + whole[start:end] * (scans - whole.count(b"\xff\xda") + 1) + whole[end:]
