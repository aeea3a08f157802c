"""Compiles the CPU's kernels ahead of time: `python -m steadynorm.warmup`.

A kernel is compiled when it is first used, which takes a second or two, and kept on disk for later processes. Where the
first step must not wait, as in an image that is built once and started often, run this beforehand.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import product

__all__ = ["main"]

_EXAMPLES = """examples:
  python -m steadynorm.warmup                             float32, with and without ReLU and residual
  python -m steadynorm.warmup --dtype float32 bfloat16    for both dtypes
  python -m steadynorm.warmup --activation relu6 silu     for other activations
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: compiles, and says what and how long it took.

    Args:
        arguments: Those of the command line; None for the process's own.

    Returns:
        The exit code: 0; argparse ends the process with 2 for arguments it does not know.
    """
    import torch

    from steadynorm import activations
    from steadynorm.ops.cpu import column_kernels, plane_kernels
    from steadynorm.ops.cpu.backend import way_of
    from steadynorm.ops.cpu.call import KINDS, Kinds
    from steadynorm.ops.cpu.shortcut import way_after_residual

    parser = argparse.ArgumentParser(
        prog="python -m steadynorm.warmup",
        description="Compile the CPU's kernels ahead of time; they are kept on disk (NUMBA_CACHE_DIR says where).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [str(dtype).removeprefix("torch.") for dtype in KINDS]
    parser.add_argument("--dtype", nargs="+", choices=names, default=["float32"], help="of the input (default float32)")
    parser.add_argument(
        "--activation",
        nargs="+",
        choices=["none", *activations.NAMES],
        default=["none", "relu"],
        help="fused (default: none relu)",
    )
    chosen = parser.parse_args(arguments)
    fused = [None if name == "none" else activations.Activation(name) for name in chosen.activation]
    started, kernels = time.perf_counter(), 0
    wanted: set[Kinds] = set()
    for dtype, activation in product([getattr(torch, name) for name in chosen.dtype], fused):
        plain, memory = way_of(activation, dtype, weighted=False)[0], KINDS[dtype]
        # After a residual a layer may keep bits; `functional.batch_norm` and compiled graphs keep the residual.
        wanted |= {Kinds(memory, added, activation=plain) for added in ("", memory)}
        wanted.add(Kinds(memory, memory, activation=way_after_residual(activation, dtype)[0]))
    for kinds, module in product(sorted(wanted), (plane_kernels, column_kernels)):
        for kernel in (module.forward, module.backward, module.forward_in_parts, module.backward_in_parts):
            if sys.stderr.isatty():
                print(f"\r{kernels + 1} of {8 * len(wanted)} kernels", end="", file=sys.stderr, flush=True)  # noqa: T201
            kernel.compile(kinds)
            kernels += 1
    if sys.stderr.isatty():
        print(file=sys.stderr)  # noqa: T201
    print(f"{kernels} kernels are ready, after {time.perf_counter() - started:.1f} s.")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
