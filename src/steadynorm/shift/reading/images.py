"""Images as a table: what a camera, a lens or a preprocessing step would change, one number per image each."""

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steadynorm.errors import DataError
from steadynorm.shift.reading.arrays import ArrayFrame
from steadynorm.shift.reading.values import from_array

__all__ = ["FEATURES", "features", "frame_of"]

FEATURES: Final = ("brightness", "contrast", "sharpness", "width", "height", "aspect")
"""Of every image; besides them a mean and a standard deviation of each channel, where there is more than one."""

_LUMA: Final = np.array([0.299, 0.587, 0.114])
_BLOCK: Final = 2**22  # values measured at once: 32 MB in float64


def features(images: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """The features of images of one size.

    | feature | what it is |
    | --- | --- |
    | red_mean, red_std, green_..., blue_... | mean and biased standard deviation of a channel's pixels |
    | brightness | mean of the grey image g = 0.299 red + 0.587 green + 0.114 blue |
    | contrast | biased standard deviation of g |
    | sharpness | biased variance of g's Laplacian, g(up) + g(down) + g(left) + g(right) - 4 g, without the border |
    | width, height, aspect | in pixels, and width / height |

    Where there are not three channels they are called channel_0_mean and so on, and g is their mean; a single channel
    has brightness and contrast alone, which say the same. Sharpness is missing under 3 x 3 pixels.

    Args:
        images: (N, C, H, W), of any real dtype; 8-bit ones are divided by 255.

    Returns:
        (N,) float64 each.

    Raises:
        DataError: Another shape, no pixels, or a dtype that is not real.

    Source:
        Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy: a comparative study (2000), for sharpness;
        ITU-R BT.601 for the weights of brightness.

    Example:
        >>> found = features(np.full((2, 3, 4, 8), 255, dtype=np.uint8))
        >>> found["brightness"], found["contrast"], found["aspect"]
        (array([1., 1.]), array([0., 0.]), array([2., 2.]))
    """
    if images.ndim != 4 or images.dtype.kind not in "biuf" or not all(images.shape[1:]):
        raise DataError(
            f"images of shape (N, C, H, W) with real values are required, got {images.dtype} of shape {images.shape}."
        )
    step = max(1, _BLOCK // int(np.prod(images.shape[1:])))
    blocks = [_block(images[start : start + step]) for start in range(0, max(1, len(images)), step)]
    return joined(blocks)


def joined(blocks: Iterable[dict[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """The features of several blocks of images after one another; all must have the same ones."""
    parts = list(blocks)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def frame_of(name: str, images: NDArray[Any]) -> ArrayFrame:
    """Images (N, C, H, W) as a table of their features.

    Raises:
        DataError: See `features`.
    """
    try:
        found = features(images)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return ArrayFrame(name, len(images), {column: from_array(values) for column, values in found.items()})


def _block(images: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    n, channels, height, width = images.shape
    pixels = images.astype(np.float64) / (255.0 if images.dtype == np.uint8 else 1.0)
    names = ("red", "green", "blue") if channels == 3 else tuple(f"channel_{i}" for i in range(channels))
    found: dict[str, NDArray[np.float64]] = {}
    with np.errstate(invalid="ignore", over="ignore"):  # images that hold NaN have no such features
        for i, channel in enumerate(names if channels > 1 else ()):
            found[f"{channel}_mean"] = pixels[:, i].mean(axis=(1, 2))
            found[f"{channel}_std"] = pixels[:, i].std(axis=(1, 2))
        grey = np.tensordot(pixels, _LUMA, axes=(1, 0)) if channels == 3 else pixels.mean(axis=1)
        found["brightness"] = grey.mean(axis=(1, 2))
        found["contrast"] = grey.std(axis=(1, 2))
        found["sharpness"] = _sharpness(grey)
    sizes = (float(width), float(height), width / height)
    return found | {name: np.full(n, size) for name, size in zip(FEATURES[3:], sizes, strict=True)}


def _sharpness(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    if min(grey.shape[1:]) < 3:
        return np.full(len(grey), np.nan)
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    return laplacian.var(axis=(1, 2))
