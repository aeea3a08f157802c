"""The CPU backend against the definition: every way through memory, layout and dtype.

Each step runs where all that the backend allocates holds NaN and lies between guards: an element that is not written,
or written to where it should not be, fails the comparison or the guard. Tests share what kernels are compiled for
(dtypes, kind of activation, which arrays there are): compiling, not running them, is what they take time for.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from steadynorm.ops.cpu.geometry import geometry
from steadynorm.ops.layout import Layout
from support import assert_close, laid_out, wide
from support_kernels import SHAPES, Result, check, expected, make, randn, run


class Path(NamedTuple):
    """A shape, the threads, and what `geometry` must make of them for the shape to test what it is here for."""

    why: str
    shape: tuple[int, ...]
    threads: int
    columns: bool
    chunks: bool  # whether there are several
    parts: bool
    folded: bool = False  # whether a row has several examples


PATHS = [
    Path("planes longer than a run of 1024, the last run shorter", (3, 5, 33, 40), 1, False, True, False),
    Path("planes shorter than a run, too few rows for columns", (3, 4, 10), 1, False, True, False),
    Path("one channel on many threads: parts that begin within a plane", (5, 1, 101, 103), 4, False, False, True),
    Path("two channels in parts", (3, 2, 109, 111), 2, False, True, True),
    Path("one example", (1, 4, 30, 30), 1, False, True, False),
    Path("more threads than channels, which are too small for parts", (1, 2, 150, 110), 4, False, True, False),
    Path("many channels on several threads", (2, 33, 25, 25), 4, False, True, False),
    Path("rows of a whole example", (20, 700), 1, True, False, False),
    Path("more rows than a block of 64, in fours and a rest", (150, 600), 1, True, False, False),
    Path("rows of fewer columns than a vector holds several times", (37, 48), 1, True, False, False),
    Path("26 examples a row, four rows but for the last one's end", (99, 19), 1, True, False, False, True),
    Path("a width that is no multiple of a vector", (55, 19), 1, True, False, False, True),
    Path("fewer examples than fit into a row", (5, 3), 1, True, False, False, True),
    Path("the smallest batch with a variance", (2, 1), 1, True, False, False, True),
    Path("more channels than a chunk holds, the last chunk shorter", (9, 2500), 1, True, True, False),
    Path("two full chunks, spatial size 1", (6, 2048, 1, 1), 1, True, True, False),
    Path("as many chunks as keep two threads busy without parts", (8, 5000), 2, True, True, False),
    Path("small planes, an example a row", (9, 3, 7, 5), 1, True, False, False),
    Path("small planes, 17 examples a row", (40, 3, 2, 5), 1, True, False, False, True),
    Path("small planes in chunks of 24 channels", (5, 40, 6, 7), 1, True, True, False),
    Path("the largest of small planes: a chunk holds two", (4, 5, 511), 1, True, True, False),
    Path("parts of rows that are folded, the last row shorter", (4099, 16), 4, True, False, True, True),
    Path("parts of several chunks, more than stays in the cache", (360, 1500), 2, True, True, True),
    Path("small planes in parts", (600, 2, 5, 6), 2, True, False, True, True),
    Path("small planes: all rows of some channels for each thread", (64, 8, 8, 10), 2, True, True, False),
    Path("all rows of some columns for each thread", (140, 500), 2, True, True, False),
    Path("one channel, one position: a row of examples", (40001, 1), 2, True, False, True, True),
]  # fmt: skip


@cache
def answer(shape: tuple[int, ...]) -> Result:
    return expected(make(shape))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.shape}, {path.why}")
def test_every_way_through_memory(path):
    step = make(path.shape)
    read = geometry(step.x, Layout.of(step.x), path.threads, False)
    folded = read.width > path.shape[1] * read.inner
    assert (read.columns, read.chunks > 1, read.parts > 1, folded) == path[3:], "the shape no longer takes its path"
    check(run(step, path.threads), answer(path.shape), torch.float32)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("shape", [(140, 500), (5, 1, 101, 103), (600, 2, 5, 6)], ids=str)
def test_any_number_of_threads_gives_the_same_to_tolerance(shape, n):
    check(run(make(shape), n), answer(shape), torch.float32)


def channels_last_of_3d(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


LAYOUTS = {
    "contiguous": ((6, 3, 8, 9), torch.Tensor.contiguous),
    "channels last, 2d": ((6, 3, 8, 9), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels last, 2d, one example": ((1, 3, 8, 9), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels last, 3d": ((3, 5, 4, 3, 5), channels_last_of_3d),
    "channels last, (N, C, L)": ((6, 5, 7), lambda x: laid_out(x, "channels_last")),
    "batch fastest": ((6, 3, 8, 9), lambda x: laid_out(x, "permuted")),
    "batch fastest, (N, C)": ((40, 7), lambda x: laid_out(x, "permuted")),
    "width before height": ((6, 3, 24, 25), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "channels between the axes": ((6, 3, 8, 9), lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)),
    "channels first": ((6, 3, 30, 9), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "sliced": ((6, 3, 8, 9), lambda x: laid_out(x, "sliced")),
    "sliced channels last": ((6, 3, 8, 9), lambda x: laid_out(torch.cat([x, x], 1), "channels_last")[:, :3]),
    "offset": ((6, 3, 8, 9), lambda x: laid_out(x, "offset")),
    "expanded": ((6, 3, 8, 9), lambda x: x[:1].expand_as(x)),
    "one channel, channels last": ((6, 1, 8, 9), lambda x: x.contiguous(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    shape, lay_out = LAYOUTS[name]
    step = make(shape)
    step = step._replace(x=lay_out(step.x))
    wanted = expected(step)
    for upstream in (step.grad_y, lay_out(step.grad_y)):  # laid out as the input is, or not
        if name == "expanded" and upstream is not step.grad_y:
            wanted = expected(step._replace(grad_y=upstream))
        found = run(step._replace(grad_y=upstream))
        check(found, wanted, torch.float32)
        assert found.y.stride() == found.grad_x.stride() == torch.empty_like(step.x).stride()


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_and_masks_in_every_layout(name):
    """One weight per position, wherever in memory that is; what is masked holds NaN."""
    shape, lay_out = LAYOUTS[name]
    positions = (shape[0], *shape[2:])
    mask = randn(*positions, seed=5) > -1
    hidden = ~mask.unsqueeze(1).expand(shape)
    step = make(shape, weight=(randn(*positions, seed=6).abs() + 0.1).float(), mask=mask)
    if name != "expanded":
        step = step._replace(
            x=step.x.masked_fill(hidden, float("nan")), grad_y=step.grad_y.masked_fill(hidden, float("nan"))
        )
    step = step._replace(x=lay_out(step.x))
    found, wanted = run(step), expected(step)
    check(found, wanted, torch.float32)
    assert not found.y[hidden].any()
    assert not found.grad_x[hidden].any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("dtype", "affine", "residual", "activation", "weighted"),
    [
        (torch.float64, torch.float64, torch.float64, "gelu_tanh", True),
        (torch.float64, torch.float64, None, None, False),
        (torch.bfloat16, torch.float32, torch.bfloat16, "relu", False),
        (torch.float16, torch.float16, torch.float32, "relu6", True),
    ],
)
def test_dtypes(dtype, affine, residual, activation, weighted, shape):
    """float32 arithmetic for the half precisions; weight, bias and residual may be of other dtypes."""
    step = make(shape, dtype, activation=activation)
    step = step._replace(gamma=(step.gamma * 2).to(affine), beta=step.beta.to(affine))
    if residual is not None:
        step = step._replace(residual=randn(*shape, seed=4).to(residual))
    if weighted:
        step = step._replace(weight=randn(shape[0], seed=5).abs().float())
    found, wanted = run(step), expected(step)
    check(found, wanted, dtype)
    assert (found.y.dtype, found.grad_x.dtype, found.grad_gamma.dtype) == (dtype, dtype, affine)
    if residual is not None:
        assert found.grad_residual.dtype == residual


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_half_precision_results_are_the_nearest_ones(shape):
    """The sum with the residual and the activation are taken before anything is rounded, and then it is to nearest."""
    step = make(shape, torch.bfloat16, residual=randn(*shape, seed=4).bfloat16())
    step = step._replace(gamma=step.gamma.float(), beta=step.beta.float())
    found, wanted = run(step), expected(step)
    nearest = torch.from_numpy(wanted.y.astype(np.float64)).bfloat16()
    off = (found.y != nearest).double().mean()  # a few lie so near to a tie that float32's own rounding decides
    assert off < 2e-3
    assert ((found.y.double() - nearest.double()).abs() <= nearest.double().abs() * 2**-7).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
def test_a_residual_behind_any_strides(layout, shape):
    step = make(shape)
    residual = randn(*shape, seed=4).float()
    check(
        run(step._replace(residual=laid_out(residual, layout))),
        expected(step._replace(residual=residual)),
        torch.float32,
    )


def test_weight_and_bias_of_different_dtypes():
    """Neither is narrowed to the other's dtype: one has too few digits for that, the other too small a range."""
    step = make((30, 7))
    gamma, beta = step.gamma.bfloat16(), step.beta.half()
    gamma[0] = 2.0**17
    step = step._replace(gamma=gamma, beta=beta)
    found, wanted = run(step), expected(step)
    assert_close(found.y, wanted.y, "output")
    assert_close(found.grad_gamma, wanted.grad_gamma, "gradient")
    assert_close(found.grad_beta, wanted.grad_beta, "gradient")
    scale = wide(gamma).reshape(1, -1)
    assert_close(found.grad_x / torch.from_numpy(scale.astype(np.float32)), wanted.grad_x / scale, "gradient")


def test_a_weight_that_is_not_contiguous():
    step = make((30, 7))
    padded = torch.stack([step.gamma, torch.full_like(step.gamma, float("nan"))], 1)
    check(run(step._replace(gamma=padded[:, 0])), expected(step), torch.float32)
