"""Reading images that come from a browser: of the usual kinds, of a bearable size, upright."""

from pathlib import Path

from PIL import Image

from odconv.data import read_image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MEGABYTES = 20
"""Of a file."""
MEGAPIXELS = 50
"""Of an image, since a transparent one takes 15 bytes a pixel while it is read."""


def read_upload(path: Path) -> Image.Image:
    """Read an image as browsers show it: turned as its EXIF data say, over white where it is transparent.

    Args:
        path: the file; its name stands in errors.

    Returns:
        The image, in mode RGB.

    Raises:
        ValueError: the file is missing, no image of FORMATS, or damaged, or has too many pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
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
        raise ValueError(f"{path.name} is damaged: {error.__cause__}.") from error
