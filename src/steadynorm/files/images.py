"""One image file as an array."""

import struct
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steadynorm.errors import DataError

__all__ = ["SUFFIXES", "is_image", "read_image"]

SUFFIXES: Final = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)


def is_image(path: Path) -> bool:
    """Whether a file's name ends like an image's.

    Example:
        >>> is_image(Path("cat.JPG")), is_image(Path("cat.txt"))
        (True, False)
    """
    return path.suffix.lower() in SUFFIXES


def read_image(path: Path) -> NDArray[np.float32]:
    """The pixels of an image file in [0, 1]; transparency is dropped, of an animation the first frame counts.

    Args:
        path: An existing file.

    Returns:
        (H, W, 1) of a grey image (16-bit ones divided by 65535, others by 255), or (H, W, 3) of any other, as RGB.

    Raises:
        DataError: The file is damaged, no image, too large, or has more than 16 bits per channel.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode.startswith("I;16"):  # Pillow's own conversion cuts 16-bit values off at 255
                return _scaled(np.asarray(image), 65535)[..., None]
            if mode in ("1", "L", "LA"):
                return _scaled(np.asarray(image.convert("L")), 255)[..., None]
            if mode not in ("I", "F"):
                return _scaled(np.asarray(image.convert("RGB")), 255)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error} Use smaller images.") from error
    # A damaged file makes Pillow's decoders raise any of these.
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        raise DataError(
            f"{path}: cannot be read as an image: {type(error).__name__}: {error}. Replace or remove the file."
        ) from error
    raise DataError(f"{path}: 8 or 16 bits per channel are required, got mode {mode!r}. Save it with 8 bits.")


def _scaled(image: NDArray[Any], largest: int) -> NDArray[np.float32]:
    return np.divide(image, np.float32(largest), dtype=np.float32)
