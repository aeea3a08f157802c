"""What `benchmarks/cpu.py` measures: inputs of the batch norms of real networks, and the bytes that they must move."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from models import norm_shapes

__all__ = ["BANDS", "PASSES", "VARIANTS", "Row", "band", "floor_transfers", "full_suite", "quantiles", "select"]

MB = 1e6
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = ("float32", "bfloat16")
LAYOUTS = ("contiguous", "channels_last")
VARIANTS = {"plain": "BN", "relu": "BN + ReLU", "add_relu": "BN + add + ReLU"}
PASSES = {"forward": "forward", "both": "forward + backward"}
BANDS = {"small": "under 1 MB", "medium": "1 to 32 MB", "large": "over 32 MB"}

BATCHES = (1, 2, 4, 8, 16, 32, 64)
# A U-Net's five levels on images of 256 x 256 (Ronneberger et al. 2015, padded, with batch norm).
U_NET = [(64 * 2**level, 256 // 2**level, 256 // 2**level) for level in range(5)]
MLPS = [(128, 64), (256, 256), (64, 1024), (512, 512), (2048, 512), (4096, 1024), (16384, 1024), (65536, 1024)]
LARGEST_IMAGES = 210 * MB  # of float32
OTHERS_EVERY = 4  # what is not float32 BN + ReLU is measured at every fourth shape
SMALL_EVERY, SMALL_LARGEST = 9, 60 * MB


@dataclass(frozen=True)
class Row:
    """One input and what is done to it.

    Attributes:
        network: Where such an input comes from.
        shape: Its sizes: (N, C) or (N, C, H, W).
        dtype: A key of ITEM_BYTES; gamma, beta and the running statistics stay in float32.
        layout: One of LAYOUTS.
        variant: A key of VARIANTS.
    """

    network: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    variant: str

    @property
    def name(self) -> str:
        """As `--rows` matches it."""
        return f"{self.network} {'x'.join(map(str, self.shape))} {self.dtype} {self.layout} {self.variant}"

    @property
    def x_bytes(self) -> int:
        """The size of x, hence of every activation of the row."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def floor_transfers(variant: str, direction: str) -> tuple[int, int]:
    """Whole activations (read, written) by a batch norm that finds its channels in the cache at the second pass.

    Forward it reads x (and the residual) and writes y. Backward it reads x and the gradient of y and writes that of x;
    after an add and a ReLU the mask cannot be told from x alone, so that it reads a third activation, and it also
    writes the residual's gradient.
    """
    added = variant == "add_relu"
    return {"forward": (1 + added, 1), "backward": (2 + added, 1 + added)}[direction]


def band(x_bytes: float) -> str:
    """The band of a size: the key of BANDS."""
    return "small" if x_bytes < MB else "medium" if x_bytes <= 32 * MB else "large"


def shapes() -> list[tuple[str, tuple[int, ...]]]:
    """Every network's inputs, each shape once: the batches go round, two for each place in a network."""
    found: dict[tuple[int, ...], str] = {}
    images = {
        "resnet50": norm_shapes("resnet50"),
        "mobilenet_v2": norm_shapes("mobilenet_v2"),
        "u_net": U_NET,
    }
    places = [(network, shape) for network, inputs in images.items() for shape in inputs]
    for i, (network, shape) in enumerate(places):
        for step in (0, 3):
            sizes = (BATCHES[(2 * i + step) % len(BATCHES)], *shape)
            if math.prod(sizes) * ITEM_BYTES["float32"] <= LARGEST_IMAGES:
                found.setdefault(sizes, network)
    for shape in MLPS:
        found[shape] = "mlp"
    return [(network, shape) for shape, network in found.items()]


def full_suite() -> list[Row]:
    """All rows, by size: float32 BN + ReLU at every shape, what else there is at every fourth."""
    rows: list[Row] = []
    for i, (network, shape) in enumerate(shapes()):
        kinds = list(itertools.product(DTYPES, LAYOUTS, VARIANTS))
        for k, (dtype, layout, variant) in enumerate(kinds):
            main = (dtype, variant) == ("float32", "relu")
            # The largest MLP is asked for in the plainest kind only: each further one would take a tenth of a run.
            turn = (i + k) % OTHERS_EVERY == 0 and shape != MLPS[-1]
            if (main or turn) and (len(shape) == 4 or layout == "contiguous"):
                rows.append(Row(network, shape, dtype, layout, variant))
    return sorted(rows, key=lambda row: (row.x_bytes, row.name))


def select(subset: str, pattern: str | None) -> list[Row]:
    """The rows of a subset (`small` or `full`) whose name matches a regular expression anywhere."""
    rows = full_suite()
    if subset == "small":
        rows = [row for row in rows if row.x_bytes <= SMALL_LARGEST]
        rows = sorted(rows, key=lambda row: (row.dtype, row.variant, row.layout, row.x_bytes))[::SMALL_EVERY]
        rows.sort(key=lambda row: (row.x_bytes, row.name))
    return [row for row in rows if pattern is None or re.search(pattern, row.name)]


def quantiles(rows: Sequence[Row], n: int) -> list[Row]:
    """At most n of the rows of float32 BN + ReLU above 1 MB, spread evenly over their sizes."""
    able = [row for row in rows if row.x_bytes > MB and (row.dtype, row.variant) == ("float32", "relu")]
    if len(able) <= n:
        return able
    return [able[round(i * (len(able) - 1) / max(n - 1, 1))] for i in range(n)]
