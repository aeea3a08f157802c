"""The corruptions of CIFAR-10-C for images of any small size, grey or RGB, from numpy, scipy and Pillow alone.

    corrupt(images, "fog", 5)

The constants are the published ones for 32 x 32 images; how each is made follows the paper's definitions, and the
result is rounded to 8 bits, as a stored image would be. Those that need other libraries or photographs (frost, snow,
spatter, glass, motion and elastic blur) are left out. `VALIDATION` are the paper's extra corruptions, kept apart for
choosing settings; `REPORTED` are those that figures are given for.

Source: Hendrycks, Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations" (2019);
constants: https://github.com/hendrycks/robustness, ImageNet-C/create_c/make_cifar_c.py.
"""

import io
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float64]
Rng = np.random.Generator

CONSTANTS: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
}
MEANING = {
    "gaussian_noise": "standard deviation of the noise",
    "shot_noise": "photons at full brightness",
    "impulse_noise": "share of values set to 0 or 1",
    "defocus_blur": "radius of the disk, standard deviation of its edge, in pixels",
    "zoom_blur": "end of the zoom, from 1 in steps of 0.01 (exclusive)",
    "fog": "amount, decay of the fractal",
    "brightness": "added to the V of HSV",
    "contrast": "factor on the distance from the image's mean",
    "pixelate": "scale of the coarser image",
    "jpeg_compression": "quality",
    "speckle_noise": "standard deviation of the factor",
    "gaussian_blur": "standard deviation in pixels",
    "saturate": "factor on the S of HSV, added to it",
}
VALIDATION = ("speckle_noise", "gaussian_blur", "saturate")
REPORTED = tuple(name for name in CONSTANTS if name not in VALIDATION)
SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: NDArray[Any], name: str, severity: int, seed: int = 0) -> NDArray[np.float32]:
    """Images as a camera or a network would have spoilt them.

    Args:
        images: (N, C, H, W) in [0, 1], C = 1 (grey) or 3 (RGB; `saturate` needs it).
        name: One of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of the noise; the same seed gives the same images.

    Returns:
        The same shape in [0, 1], multiples of 1/255.
    """
    x = np.asarray(images, dtype=np.float64)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or (x.size and not (x.min() >= 0 and x.max() <= 1)):
        raise ValueError(f"images must be (N, 1 or 3, H, W) in [0, 1], got shape {x.shape}.")
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(
            f"no corruption {name!r} at severity {severity!r}; there are {', '.join(CORRUPTIONS)} at 1 to 5."
        )
    if name == "saturate" and x.shape[1] == 1:
        raise ValueError("saturate needs RGB images: grey ones have no saturation.")
    if not len(x):
        return x.astype(np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), severity])
    spoilt = CORRUPTIONS[name](x, CONSTANTS[name][severity - 1], rng)
    return (np.rint(np.clip(spoilt, 0, 1) * 255) / 255).astype(np.float32)


def corruptions_for(channels: int) -> tuple[str, ...]:
    """The names that make sense for images of so many channels."""
    return tuple(name for name in CORRUPTIONS if channels == 3 or name != "saturate")


def _gaussian_noise(x: Images, c: float, rng: Rng) -> Images:
    return x + c * rng.standard_normal(x.shape)


def _shot_noise(x: Images, c: float, rng: Rng) -> Images:
    return rng.poisson(x * c) / c


def _impulse_noise(x: Images, c: float, rng: Rng) -> Images:
    hit, salt = rng.random(x.shape) < c, rng.random(x.shape) < 0.5
    return np.where(hit, salt.astype(np.float64), x)


def _speckle_noise(x: Images, c: float, rng: Rng) -> Images:
    return x * (1 + c * rng.standard_normal(x.shape))


def _gaussian_blur(x: Images, c: float, rng: Rng) -> Images:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, 0, c, c), mode="nearest", truncate=4)


def disk(radius: float, edge: float) -> Images:
    """A disk's indicator of sum 1, softened by a 3 x 3 Gaussian: the kernel of a lens out of focus."""
    from scipy.ndimage import convolve

    at = np.arange(-8, 9)
    flat = (at[:, None] ** 2 + at**2 <= radius**2).astype(np.float64)
    line = np.exp(-(np.array([-1.0, 0.0, 1.0]) ** 2) / (2 * edge**2))
    soft = np.outer(line, line) / line.sum() ** 2
    return convolve(flat / flat.sum(), soft, mode="constant")


def _defocus_blur(x: Images, c: tuple[float, float], rng: Rng) -> Images:
    from scipy.ndimage import convolve

    reach = math.ceil(c[0]) + 1  # beyond it the kernel is 0
    kernel = disk(*c)[8 - reach : 9 + reach, 8 - reach : 9 + reach]
    return convolve(x, kernel[None, None], mode="mirror")


def _zoom_blur(x: Images, c: float, rng: Rng) -> Images:
    factors = np.arange(1, c, 0.01)
    return (x + sum(_zoomed(x, float(factor)) for factor in factors)) / (len(factors) + 1)


def _zoomed(x: Images, factor: float) -> Images:
    """The middle of the images, enlarged to their own size."""
    rows, columns = (enlarging(side, factor) for side in x.shape[2:])
    return rows @ x @ columns.T


def enlarging(side: int, factor: float) -> Images:
    """(side, side): linear interpolation of the middle of a line, corners aligned, the excess cut off."""
    inner = math.ceil(side / factor)
    large = round(inner * factor)
    at = (np.arange(side) + (large - side) // 2) * (inner - 1) / (large - 1)
    return np.maximum(1 - abs(at[:, None] + (side - inner) // 2 - np.arange(side)), 0)


def plasma(n: int, size: int, decay: float, rng: Rng) -> Images:
    """(n, size, size) fractals in [0, 1] by the diamond-square algorithm on a torus; `size` a power of two."""
    field = np.zeros((n, size, size))
    step, wobble = size, 100.0

    def filled(total: Images) -> Images:
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corner = field[:, ::step, ::step]
        across = corner + np.roll(corner, -1, 1)
        field[:, half::step, half::step] = filled(across + np.roll(across, -1, 2))
        middle, corner = field[:, half::step, half::step], field[:, ::step, ::step]
        field[:, ::step, half::step] = filled(middle + np.roll(middle, 1, 1) + corner + np.roll(corner, -1, 2))
        field[:, half::step, ::step] = filled(middle + np.roll(middle, 1, 2) + corner + np.roll(corner, -1, 1))
        step, wobble = half, wobble / decay
    field -= field.min((1, 2), keepdims=True)
    return field / field.max((1, 2), keepdims=True)


def _fog(x: Images, c: tuple[float, float], rng: Rng) -> Images:
    side = 1 << (max(x.shape[2:]) - 1).bit_length()
    cloud = plasma(len(x), side, c[1], rng)[:, None, : x.shape[2], : x.shape[3]]
    brightest = x.max((1, 2, 3), keepdims=True)
    return (x + c[0] * cloud) * brightest / (brightest + c[0])


def _brightness(x: Images, c: float, rng: Rng) -> Images:
    value = x.max(1, keepdims=True)  # at fixed hue and saturation, RGB is proportional to V
    brighter = np.clip(value + c, 0, 1)
    return np.where(value > 0, x * (brighter / np.where(value > 0, value, 1)), brighter)


def _contrast(x: Images, c: float, rng: Rng) -> Images:
    mean = x.mean((2, 3), keepdims=True)
    return (x - mean) * c + mean


def _saturate(x: Images, c: tuple[float, float], rng: Rng) -> Images:
    value = x.max(1, keepdims=True)
    spread = value - x.min(1, keepdims=True)
    saturation = spread / np.where(value > 0, value, 1)
    wanted = np.clip(saturation * c[0] + c[1], 0, 1)
    # Grey has hue 0 by convention, which is red.
    missing = np.where(
        spread > 0, (value - x) / np.where(spread > 0, spread, 1), np.array([0.0, 1.0, 1.0])[:, None, None]
    )
    return value - missing * value * wanted


def _pixelate(x: Images, c: float, rng: Rng) -> Images:
    height, width = x.shape[2:]

    def coarse(image: Any) -> Any:
        from PIL import Image

        box = Image.Resampling.BOX
        return image.resize((int(width * c), int(height * c)), box).resize((width, height), box)

    return _through_pillow(x, coarse)


def _jpeg_compression(x: Images, c: int, rng: Rng) -> Images:
    def compressed(image: Any) -> Any:
        from PIL import Image

        file = io.BytesIO()
        image.save(file, "JPEG", quality=c)
        return Image.open(file)

    return _through_pillow(x, compressed)


def _through_pillow(x: Images, change: Callable[[Any], Any]) -> Images:
    from PIL import Image

    bytes_ = np.rint(x * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    grey = x.shape[1] == 1
    done = [np.asarray(change(Image.fromarray(image[..., 0] if grey else image))) for image in bytes_]
    return np.stack(done).reshape(bytes_.shape).transpose(0, 3, 1, 2) / 255.0


CORRUPTIONS: dict[str, Callable[[Images, Any, Rng], Images]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "zoom_blur": _zoom_blur,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "saturate": _saturate,
}
