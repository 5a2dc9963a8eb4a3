"""Read images that come from a browser: of common formats and limited size, turned upright."""

from pathlib import Path
from typing import Any

from PIL import Image

from odconv.app.data import read_image
from odconv.app.data.images import LARGEST
from odconv.system.files import open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MEGABYTES = 20
"""Of a file."""
MEGAPIXELS = 50
"""Of an image, since a transparent one takes 15 bytes a pixel while it is read."""


def dropped(upload: Any, place: Path) -> Path:
    """Return the file that a page says was dropped on it; a ValueError if it is none in the folder for that.

    The page may say anything, for anybody may.
    """
    path = Path(str(upload.get("path"))) if isinstance(upload, dict) else Path()
    if not path.resolve().is_relative_to(place.resolve()) or not path.is_file():
        raise ValueError(f"{path.name} was not dropped here.")
    return path


def read_upload(path: Path) -> Image.Image:
    """Read an image as browsers show it, in RGB: turned as its EXIF data say, over white where it is transparent.

    A ValueError, in words for the page, if it is no image of FORMATS, damaged, too large, or takes too long to decode.
    """
    try:
        with open_regular(path, LARGEST) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path.name} has far more than {MEGAPIXELS} million pixels, which are allowed.") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path.name} is no image of the kinds {', '.join(FORMATS)}.") from error
    if width * height > MEGAPIXELS * 10**6:
        raise ValueError(f"{path.name} has {width} x {height} pixels; {MEGAPIXELS} million are allowed.")
    try:
        return read_image(path, upright=True)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.__cause__}.") from error
