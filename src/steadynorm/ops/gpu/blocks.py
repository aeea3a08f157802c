"""How a tensor is cut into the tiles of `tiles`, and over how many programs: by its shape and dtype alone.

So the same call gives the same bits each time, on every GPU. There are few sizes of tiles, as each is a kernel of its
own that is compiled when it is first met; nothing is tuned by timing.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from torch import Tensor

from steadynorm.ops.layout import Layout

__all__ = ["Blocks", "blocks_of", "cut"]

_TILE_BYTES = 8192  # of x that a program reads at once: 16 values of float32 per thread of 4 warps
_RESIDENT = 32768  # bytes, in the dtype computed in, that a program keeps on chip of a channel
_LONGEST = 128  # positions of a tile of columns: more would be too many for one sum in float32
_PROGRAMS = 4096  # about as many as four waves on a large GPU, which leaves no wave half empty
_MOST_PARTS = 512
_LONGEST_RUN = 8
_PER_THREAD = 64  # bytes of a tile in the dtype computed in
_UNITS = (16, 4)
_PARTS = (32, 128, _MOST_PARTS)
_SMALL_TILE = 256
_FAR = 2**31  # elements, from where on 32 bits do not count them


def _over(n: int, block: int) -> int:
    """How many blocks hold n."""
    return -(-n // block)


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Blocks:
    """N rows of C channels of S adjacent positions each, cut into tiles of `block_p` positions and `block_c` channels.

    Of a plane, a tile holds `block_s` adjacent positions of each row. Each value is computed with in `wide` bytes.
    """

    rows: int
    adjacent: int
    channels: int
    columns: bool
    block_p: int
    block_s: int
    block_c: int
    wide: int

    @cached_property
    def across(self) -> int:
        """Blocks of channels."""
        return _over(self.channels, self.block_c)

    @cached_property
    def per_row(self) -> int:
        """Tiles side by side in a row."""
        return _over(self.adjacent, self.block_s)

    @cached_property
    def tiles(self) -> int:
        """Of a channel."""
        return self.per_row * _over(self.rows, self.block_p // self.block_s)

    @cached_property
    def steps(self) -> int:
        """Tiles that one program of a splitting kernel goes through."""
        parts = min(_over(_PROGRAMS, self.across), _MOST_PARTS, self.tiles)
        return _over(self.tiles, parts)

    @cached_property
    def parts(self) -> int:
        """Programs of such a kernel that share a channel."""
        return _over(self.tiles, self.steps)

    @cached_property
    def runs(self) -> int:
        """Tiles that one program of an elementwise kernel goes through: what it knows of its channels costs as much."""
        return max(1, min(_LONGEST_RUN, self.tiles * self.across // (2 * _PROGRAMS)))

    @cached_property
    def splitting(self) -> int:
        """Programs of a splitting kernel."""
        return self.parts * self.across

    @cached_property
    def elementwise(self) -> int:
        """Programs of an elementwise kernel."""
        return _over(self.tiles, self.runs) * self.across

    @cached_property
    def gathering(self) -> tuple[int, dict[str, int]]:
        """Programs of a kernel that gathers what the parts have found, and what it is compiled for: 4096 numbers."""
        most = next(n for n in _PARTS if n >= self.parts)
        block_c = 4096 // most
        return _over(self.channels, block_c), {"PARTS": most, "BLOCK_C": block_c, "num_warps": 8}

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """What every kernel over tiles is told: N, S, C and the tiles per row."""
        return self.rows, self.adjacent, self.channels, self.per_row

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What such a kernel is compiled for, besides the dtype."""
        side = self.channels if self.columns else self.adjacent
        unit = next((unit for unit in _UNITS if side % unit == 0), 1)
        reach = self.block_p // self.block_s * self.channels * self.adjacent
        sizes = {"BLOCK_P": self.block_p, "BLOCK_S": self.block_s, "BLOCK_C": self.block_c}
        warps = min(16, max(1, self.block_p * self.block_c * self.wide // (32 * _PER_THREAD)))
        return {"COLUMNS": self.columns, "UNIT": unit, "LONG": reach >= _FAR, **sizes, "num_warps": warps}

    @cached_property
    def resident(self) -> "Blocks | None":
        """Cut so that one tile holds all positions of a channel, where a program can keep them; else None."""
        most = _RESIDENT // self.wide
        if self.columns:
            whole = max(16, _power_of_two(self.rows))
            block_c = min(self.block_c, max(1, most // (2 * whole)))
            return replace(self, block_p=whole, block_c=block_c) if whole <= min(_LONGEST, most) else None
        block_s = _power_of_two(self.adjacent)
        whole = max(_SMALL_TILE, block_s * _power_of_two(self.rows))
        return replace(self, block_p=whole, block_s=block_s) if whole <= most else None


def cut(x: Tensor, layout: Layout) -> tuple[Tensor, Blocks]:
    """`x`, dense in one of the two ways, and its blocks."""
    columns = x.movedim(layout.dim, -1).is_contiguous() and not x.is_contiguous()
    if not columns:
        x = x.contiguous()
    adjacent = prod(x.shape[layout.dim + 1 :])
    return x, blocks_of(layout.count, 1 if columns else adjacent, layout.channels, x.element_size())


@lru_cache(maxsize=4096)
def blocks_of(count: int, adjacent: int, channels: int, itemsize: int) -> Blocks:
    """The blocks of a tensor of `count` positions, so many of them adjacent, with values of so many bytes."""
    tile, wide = _TILE_BYTES // max(2, itemsize), max(4, itemsize)
    if adjacent == 1:
        block_c = min(64, _power_of_two(channels))
        block_p = min(tile // block_c, _LONGEST, max(16, _power_of_two(count)))
        return Blocks(count, 1, channels, True, block_p, 1, block_c, wide)
    block_s = _side(adjacent, tile)
    block_p = tile if count > _SMALL_TILE else max(_SMALL_TILE, block_s)
    return Blocks(count // adjacent, adjacent, channels, False, block_p, block_s, 1, wide)


def _side(adjacent: int, tile: int) -> int:
    """Adjacent positions of a tile: as many as fit that leave at most a sixteenth of the lanes idle, if any do."""
    whole = _power_of_two(adjacent)
    if whole <= 128:
        return whole
    sides = [side for side in (2048, 1024, 512, 256, 128) if side <= min(whole, tile)]
    idle = {side: _over(adjacent, side) * side - adjacent for side in sides}
    return next((side for side in sides if idle[side] * 16 <= adjacent), min(sides, key=lambda side: idle[side]))
