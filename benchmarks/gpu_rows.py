"""What `benchmarks/gpu.py` measures: inputs of the batch norms of real networks, and the bytes that they must move."""

import math

from cpu_rows import LAYOUTS, U_NET, Row
from models import norm_shapes

__all__ = ["DTYPES", "LAYOUTS", "VARIANTS", "Row", "bytes_moved", "in_turns", "rows"]

DTYPES = ("float32", "float16", "bfloat16")
VARIANTS = ("relu", "add_relu")
BATCHES = (32, 64, 128, 256)
LARGEST = 4e9  # bytes of x in float32: with its gradients, a residual and a second set it must fit the card


def bytes_moved(row: Row) -> dict[str, int]:
    """What a batch norm that streams must read and write, of a training forward and of its backward.

    Forward: x for the statistics; x again (and the residual) to normalise; y. Backward: x and the gradient of y (and
    the residual, which tells the mask) for the sums (and the residual's gradient is written); then x and what comes
    through the activation, for the gradient of x.
    """
    added = row.variant == "add_relu"
    return {"forward": (3 + added) * row.x_bytes, "backward": (5 + 2 * added) * row.x_bytes}


def rows() -> list[Row]:
    """Every shape of each network at two batches, which go round, in every dtype, layout and variant."""
    networks = {"resnet50": norm_shapes("resnet50"), "mobilenet_v2": norm_shapes("mobilenet_v2"), "u_net": U_NET}
    found: list[Row] = []
    places = [(network, shape) for network, shapes in networks.items() for shape in shapes]
    for i, (network, shape) in enumerate(places):
        for batch in (BATCHES[i % 4], BATCHES[(i + 2) % 4]):
            if math.prod((batch, *shape)) * 4 <= LARGEST:
                for dtype in DTYPES:
                    for layout in LAYOUTS:
                        found += [Row(network, (batch, *shape), dtype, layout, variant) for variant in VARIANTS]
    return found


def in_turns(found: list[Row]) -> list[Row]:
    """In an order of which every beginning is spread over all: a run may end early, and still speak for the rest."""
    step = max(1, round(len(found) * 0.6180339887))
    while math.gcd(step, max(1, len(found))) != 1:
        step += 1
    return [found[i * step % len(found)] for i in range(len(found))]
