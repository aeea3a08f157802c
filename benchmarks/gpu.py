"""Batch norm on a GPU, side by side with its peers and with a copy on the device.

    python benchmarks/gpu.py                                  # 9 minutes: checks, times, prints a table, writes JSON
    python benchmarks/gpu.py --rows 'resnet50.*bfloat16.*last'   # those whose name matches, printed only
    python benchmarks/gpu.py --step                           # ResNet-50's training step alone

A row is an input (network, shape, dtype, layout) of BN + ReLU or BN + add + ReLU in training. In each row, ours and
every peer are first held against float64 from the definition, then timed in turns: forward, and forward + backward with
a random gradient, by events on the device, over buffers that take turns, with the cache flushed. Rows are taken in an
order of which every beginning is spread over all, until --minutes are over. Ctrl-C keeps the rows done.

`times_us` are quartiles of microseconds on the device; `host_us` until the host is free again; `errors` the largest
distance from the truth in units of what ours may have. Needs a CUDA device, and Triton.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cpu import LENIENCE, write
from cpu_oracle import worst_error
from gpu_peers import contenders, copy_of, problems
from gpu_rows import Row, bytes_moved, in_turns, rows
from gpu_step import measure_step
from gpu_table import summary
from gpu_timing import Clock, DeviceClock, in_rounds, machine, quartiles

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
ROTATED = 4 * 50e6  # bytes of x in all sets of buffers: several times what a cache holds
MOST_SETS = 8


def measure(row: Row, clock: Clock, compiled: bool, rounds: int) -> dict[str, Any]:
    """One row: checked, then timed. What is wrong is not timed."""
    found: dict[str, Any] = {
        "name": row.name,
        **{key: getattr(row, key) for key in ("network", "shape", "dtype", "layout", "variant", "x_bytes")},
        "bytes_moved": bytes_moved(row),
    }
    given = problems(row, clock.device, max(2, min(MOST_SETS, math.ceil(ROTATED / row.x_bytes))))
    peers = contenders(given, compiled)
    errors = {name: float(f"{worst_error(given[0], bound[0].outcome()):.3g}") for name, bound in peers.items()}
    found["errors"] = errors
    if errors["ours"] > 1:
        return {**found, "wrong": f"{errors['ours']:.1f} times as far from the truth as allowed"}
    peers = {name: bound for name, bound in peers.items() if errors[name] <= LENIENCE}
    copy, copy_bytes = copy_of(row, clock.device)
    passes = {
        which: {name: [getattr(peer, which) for peer in bound] for name, bound in peers.items()}
        for which in ("forward", "both")
    }
    times = {which: in_rounds(clock.device_us, calls, rounds) for which, calls in passes.items()}
    host = in_rounds(clock.host_us, passes["both"], 5)
    return {
        **found,
        "copy_bytes": copy_bytes,
        "copy_us": quartiles(in_rounds(clock.device_us, {"copy": [copy]}, rounds)["copy"]),
        "times_us": {
            which: {name: quartiles(samples) for name, samples in who.items()} for which, who in times.items()
        },
        "host_us": {name: quartiles(samples) for name, samples in host.items()},
    }


def run(arguments: argparse.Namespace, chosen: Sequence[Row], clock: Clock, about: dict[str, Any]) -> dict[str, Any]:
    """All of it, as far as the time goes; what is there so far is written after every row."""
    content: dict[str, Any] = {"machine": about, "complete": False, "step": None, "rows": []}
    ends = time.monotonic() + 60 * arguments.minutes
    try:
        if not arguments.no_step:
            print("ResNet-50's training step", file=sys.stderr)
            content["step"] = measure_step(clock, **arguments.step_options)
        for i, row in enumerate(chosen if not arguments.step else ()):
            if time.monotonic() > ends:
                break
            print(f"{i + 1} of {len(chosen)}: {row.name}", file=sys.stderr)
            content["rows"].append(measure(row, clock, i < arguments.compiled, arguments.rounds))
            if arguments.out is not None:
                write(arguments.out, content)
        content["complete"] = len(content["rows"]) == len(chosen)
    except KeyboardInterrupt:
        print(f"Stopped: {len(content['rows'])} of {len(chosen)} rows are done.", file=sys.stderr)
    if arguments.out is not None:
        write(arguments.out, content)
    return content


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", metavar="REGEX", help="only rows whose name matches; --list shows the names")
    parser.add_argument("--list", action="store_true", help="show the names of the rows, and measure nothing")
    parser.add_argument("--minutes", type=float, default=9, help="no row is begun after them (default: 9)")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each contender (default: 20)")
    parser.add_argument(
        "--compiled", type=int, default=8, metavar="N", help="first rows, with torch.compile (default: 8)"
    )
    parser.add_argument("--step", action="store_true", help="ResNet-50's training step alone")
    parser.add_argument("--no-step", action="store_true", help="rows alone")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu.json, for all rows")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    arguments = parser.parse_args(given)
    if arguments.rounds < 1 or arguments.minutes <= 0 or arguments.compiled < 0:
        parser.error("--rounds takes 1 or more, --minutes more than 0, --compiled 0 or more.")
    if arguments.step and arguments.no_step:
        parser.error("--step and --no-step leave nothing to measure: give one of them.")
    if arguments.out is None and arguments.rows is None and not arguments.step:
        arguments.out = RESULTS
    arguments.step_options = {}
    return arguments


def missing() -> str | None:
    """What is needed and not there."""
    if not torch.cuda.is_available():
        return "a CUDA device, and torch sees none. Run it on a machine with a GPU and torch's build for it"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which torch's builds for GPUs bring. Install such a build"
    return None


def main() -> None:
    """Measures, writes what --out says, and prints."""
    arguments = parsed()
    try:
        chosen = [row for row in in_turns(rows()) if arguments.rows is None or re.search(arguments.rows, row.name)]
    except re.error as error:
        print(f"--rows needs a regular expression, and {arguments.rows!r} is none: {error}.", file=sys.stderr)
        raise SystemExit(2) from None
    if not chosen:
        print(f"No row's name matches {arguments.rows!r}: --list shows them.", file=sys.stderr)
        raise SystemExit(2)
    if arguments.list:
        print("\n".join(sorted(row.name for row in chosen)))
        return
    lacking = missing()
    if lacking is not None:
        print(f"This benchmark needs {lacking}. Nothing was measured.", file=sys.stderr)
        raise SystemExit(2)
    os.environ["STEADYNORM_GPU"] = "triton"  # or an error: what is measured is to be what the rows say
    content = run(arguments, chosen, DeviceClock(), machine())
    print(json.dumps(content, allow_nan=False) if arguments.json else summary(content))
    if any("wrong" in row for row in content["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
