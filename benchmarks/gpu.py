"""Batch norm on a GPU, side by side with its peers and with a copy on the device.

    python benchmarks/gpu.py                                  # 9 minutes: checks, times, prints a table, writes JSON
    python benchmarks/gpu.py --rows 'resnet50.*bfloat16.*last'   # those whose name matches, printed only
    python benchmarks/gpu.py --step                           # ResNet-50's training step alone

A row is an input (network, shape, dtype, layout) of BN + ReLU or BN + add + ReLU in training. In each row, ours and
every peer are first held against float64 from the definition, then timed in turns: forward, backward with a random
gradient, and both together, by events on the device, over buffers that take turns, with the cache flushed. Rows are
taken in an order of which every beginning is spread over all, until --minutes are over. Ctrl-C keeps the rows done.

`times_us` are quartiles of microseconds on the device; `host_us` until the host is free again, and `graph_us` a replay
of a CUDA graph, both of forward + backward; `errors` the largest distance from the truth in units of what ours may
have; `late` how many samples the host held up. Needs a CUDA device, and Triton. Exit code 1: something is wrong.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import steadynorm as sn
from cpu import write
from gpu_measuring import measure
from gpu_rows import DTYPES, LAYOUTS, Row, in_turns, rows
from gpu_step import measure_step
from gpu_table import summary, verdicts
from gpu_timing import Clock, DeviceClock, machine
from steadynorm.errors import SteadynormError

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
COMPILING = 0.5  # of the minutes; then rows go on without torch.compile, which takes most of a row's time


def run(arguments: argparse.Namespace, chosen: Sequence[Row], clock: Clock, about: dict[str, Any]) -> dict[str, Any]:
    """All of it, as far as the time goes; what is there so far is written after every row."""
    content: dict[str, Any] = {"machine": about, "complete": False, "step": None, "rows": []}
    begun = time.monotonic()
    seconds = 60 * arguments.minutes
    try:
        if not arguments.no_step:
            print("ResNet-50's training step", file=sys.stderr)
            content["step"] = _step(clock, arguments.step_options)
            _keep(arguments.out, content)
        for i, row in enumerate(chosen if not arguments.step else ()):
            spent = time.monotonic() - begun
            if spent > seconds:
                break
            print(f"{i + 1} of at most {len(chosen)}, {spent:.0f} of {seconds:.0f} s: {row.name}", file=sys.stderr)
            compiled = i < arguments.compiled and spent < COMPILING * seconds
            content["rows"].append(measure(row, clock, compiled, arguments.rounds))
            _keep(arguments.out, content)
        content["complete"] = arguments.step or len(content["rows"]) == len(chosen)
    except KeyboardInterrupt:
        print(f"Stopped: {len(content['rows'])} of {len(chosen)} rows are done.", file=sys.stderr)
    except RuntimeError as failure:  # the device has failed, and would fail every row from here on
        content["failed"] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}"
    _keep(arguments.out, content)
    return content


def _step(clock: Clock, options: dict[str, Any]) -> dict[str, Any]:
    try:
        return measure_step(clock, **options)
    except ArithmeticError as difference:
        return {"wrong": str(difference)}
    except torch.OutOfMemoryError:
        clock.settle()
        return {"not_timed": "it needs more memory than the device has free"}


def _keep(out: Path | None, content: dict[str, Any]) -> None:
    """Written with the verdicts so far: an interrupted run says as much as a whole one about its rows."""
    content["verdicts"] = [vars(verdict) for verdict in verdicts(content)]
    if out is not None:
        write(out, content)


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", metavar="REGEX", help="only rows whose name matches; --list shows the names")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--list", action="store_true", help="show the names of the rows, and measure nothing")
    parser.add_argument("--minutes", type=float, default=8.5, help="no row is begun after them (default: 8.5)")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each contender (default: 20)")
    parser.add_argument(
        "--compiled",
        type=int,
        default=16,
        metavar="N",
        help="first rows, with torch.compile too for at most half the minutes (default: 16)",
    )
    parser.add_argument("--no-compile", action="store_const", const=0, dest="compiled", help="as --compiled 0")
    parser.add_argument("--step", "--step-only", action="store_true", help="ResNet-50's training step alone")
    parser.add_argument("--no-step", action="store_true", help="rows alone")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json, for all rows")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    arguments = parser.parse_args(given)
    if arguments.rounds < 1 or not arguments.minutes > 0 or arguments.compiled < 0:
        parser.error("--rounds takes 1 or more, --minutes more than 0, --compiled 0 or more.")
    if arguments.step and arguments.no_step:
        parser.error("--step and --no-step leave nothing to measure: give one of them.")
    part = arguments.rows is not None or len(arguments.dtypes) < len(DTYPES) or len(arguments.layouts) < len(LAYOUTS)
    if arguments.out is None and not part and not arguments.step and not arguments.no_step:
        arguments.out = RESULTS
    arguments.step_options = {}
    return arguments


def missing() -> str | None:
    """What is needed and not there."""
    if not torch.cuda.is_available():
        return "a CUDA device, and torch sees none. Run it on a machine with a GPU and torch's build for it"
    if find_spec("triton") is None:
        return "Triton, which torch's builds for GPUs bring. Install such a build"
    return None


def refused() -> str | None:
    """Why the kernels do not compute on this device: their trial, on the first call, says so."""
    os.environ["STEADYNORM_GPU"] = "triton"  # or an error: what is measured is to be what the rows say
    try:
        sn.BatchNorm2d(8, device="cuda")(torch.randn(4, 8, 2, 2, device="cuda"))
    except SteadynormError as error:
        return str(error)
    return None


def main() -> None:
    """Measures, writes what --out says, and prints."""
    arguments = parsed()
    try:
        kinds = [row for row in rows() if row.dtype in arguments.dtypes and row.layout in arguments.layouts]
        chosen = in_turns([row for row in kinds if arguments.rows is None or re.search(arguments.rows, row.name)])
    except re.error as error:
        print(f"--rows needs a regular expression, and {arguments.rows!r} is none: {error}.", file=sys.stderr)
        raise SystemExit(2) from None
    if not chosen:
        print("No row is left of these dtypes, layouts and names: --list shows all.", file=sys.stderr)
        raise SystemExit(2)
    if arguments.list:
        print("\n".join(sorted(row.name for row in chosen)))
        return
    lacking = missing()
    if lacking is not None:
        print(f"This benchmark needs {lacking}. Nothing was measured.", file=sys.stderr)
        raise SystemExit(2)
    reason = refused()
    if reason is not None:
        print(f"The kernels cannot be measured. {reason} Nothing was measured.", file=sys.stderr)
        raise SystemExit(2)
    content = run(arguments, chosen, DeviceClock(), machine())
    print(json.dumps(content, allow_nan=False) if arguments.json else summary(content))
    if content.get("failed") or any("wrong" in found for found in (*content["rows"], content["step"] or {})):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
