"""Batch norm on the CPU, side by side with its peers and with the memory floor.

    python benchmarks/cpu.py                          # all rows: some 20 minutes on two idle cores
    python benchmarks/cpu.py --subset small           # some 3 minutes
    python benchmarks/cpu.py --rows 'resnet50.*relu'  # those whose name matches
    python benchmarks/cpu_table.py                    # then writes the tables and the picture

A row is an input (network, shape, dtype, layout) and what is done to it (BN, BN + ReLU, BN + add + ReLU), measured in a
training forward and in forward + backward with a random gradient. In each row, ours and every peer are first held
against float64 from the definition (what fails is not timed), then timed in turns. Ctrl-C keeps the rows done.

Results go to benchmarks/results/cpu.json; those of a part of the rows only where --out says so. `times_us` are the
20th, 50th and 80th percentile of microseconds per call; `over_floor` the ratio of medians to the floor's; `kept_bytes`
what a forward holds for its backward; `errors` the largest distance from the truth in units of what ours may have.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from cpu_oracle import worst_error
from cpu_peers import Peer, contenders, floor, kept_for_backward, problem_of
from cpu_rows import PASSES, Row, quantiles, select
from cpu_timing import busy, interleaved, machine, percentiles

RESULTS = Path(__file__).resolve().parent / "results" / "cpu.json"
# The framework's own results are timed unless they are wrong outright: they sum in long float32 chains, and round to
# bfloat16 between batch norm, add and ReLU.
LENIENCE = 100.0
MOST_COMPILED = 40
EVEN_BYTES = 10_000_000  # what the part of a row's time that does not depend on its size amounts to


def measure(row: Row, compiled: bool, seconds: float) -> dict[str, Any]:
    """One row: checked, weighed and timed.

    Raises:
        ArithmeticError: ours is further from the truth than it may be.
    """
    problem = problem_of(row)
    peers, skipped = contenders(row, problem, compiled)
    errors: dict[str, float] = {}
    for name, peer in list(peers.items()):
        errors[name] = float(f"{worst_error(problem, peer.outcome()):.3g}")
        if errors[name] > (1.0 if name == "ours" else LENIENCE):
            if name == "ours":
                raise ArithmeticError(f"{row.name}: {errors[name]:.1f} times as far from the truth as allowed")
            skipped[name] = f"{errors[name]:.0f} times as far from the truth as allowed"
            del peers[name]
    kept = {name: weigh(peers[name]) for name in ("ours", "eager") if name in peers}
    copies = floor(row)
    passes: dict[str, Any] = {}
    for which in PASSES:
        calls = {name: getattr(peer, which) for name, peer in peers.items()} | {"floor": copies[which]}
        samples = interleaved(calls, seconds)
        times = {name: percentiles(found) for name, found in samples.items()}
        passes[which] = {
            "rounds": len(samples["floor"]),
            "times_us": times,
            "over_floor": {name: float(f"{t[1] / times['floor'][1]:.4g}") for name, t in times.items()},
        }
    return {
        "name": row.name,
        **{key: getattr(row, key) for key in ("network", "shape", "dtype", "layout", "variant", "x_bytes")},
        "passes": passes,
        "kept_bytes": kept,
        "errors": errors,
        "skipped": skipped,
    }


def weigh(peer: Peer) -> int:
    """What it keeps for backward, its parameters and running statistics apart."""
    return kept_for_backward(peer.forward, [*peer.norm.parameters(), *peer.norm.buffers()])


def progress(rows: list[Row]) -> Iterator[Row]:
    """The rows, under a bar on the terminal's error stream."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        # Large rows, which come last, take far longer: checks go by bytes, timing up to --seconds does not.
        task = bar.add_task("", total=sum(row.x_bytes + EVEN_BYTES for row in rows))
        for row in rows:
            bar.update(task, description=row.name)
            yield row
            bar.advance(task, row.x_bytes + EVEN_BYTES)


def with_huge_pages(rows: Iterable[Row], seconds: float) -> list[dict[str, Any]]:
    """The same rows in a process of their own whose every large allocation asks for huge pages, all peers' alike."""
    pattern = "^(" + "|".join(re.escape(row.name) for row in rows) + ")$"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--anyway", "--compiled", "0", "--huge-pages", "0", "--rows", pattern]
        command += ["--threads", str(torch.get_num_threads()), "--seconds", str(seconds), "--out", str(out)]
        environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(out.read_text())["rows"]


def write(path: Path, content: dict[str, Any]) -> None:
    """Puts the results in place as a whole, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, allow_nan=False).replace('{"name"', '\n{"name"') + "\n", encoding="utf-8")
    aside.replace(path)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", choices=("small", "full"), default="full", help="default: %(default)s")
    parser.add_argument("--rows", metavar="REGEX", help="only rows whose name matches; --list shows the names")
    parser.add_argument("--list", action="store_true", help="show the names of the rows, and measure nothing")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes by itself")
    parser.add_argument("--compiled", type=int, default=8, metavar="N", help="rows with torch.compile (default: 8)")
    parser.add_argument(
        "--huge-pages", type=int, default=6, metavar="N", help="rows again with huge pages (default: 6)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="timing of a row and pass (default: 1)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu.json for a full run, else none")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine too")
    arguments = parser.parse_args()
    if not 0 <= arguments.compiled <= MOST_COMPILED:
        parser.error(f"--compiled takes 0 to {MOST_COMPILED} rows: each costs seconds of compilation.")
    if arguments.out is None and arguments.subset == "full" and arguments.rows is None:
        arguments.out = RESULTS
    return arguments


def main() -> None:
    """Measures, writes what --out says, and prints."""
    arguments = parsed()
    try:
        rows = select(arguments.subset, arguments.rows)
    except re.error as error:
        raise SystemExit(f"--rows needs a regular expression, and {arguments.rows!r} is none: {error}.") from None
    if not rows:
        raise SystemExit(f"No row's name matches {arguments.rows!r}: --list shows them.")
    if arguments.list:
        print("\n".join(row.name for row in rows))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    reason, load = busy()
    if reason and not arguments.anyway:
        raise SystemExit(
            f"The machine is busy: {reason}. Wait until it is idle, or measure all the same with --anyway."
        )
    compiled = {row.name for row in quantiles(rows, arguments.compiled)}
    content: dict[str, Any] = {"machine": machine(), "load": load, "busy": reason, "complete": False}
    content |= {"rows": [], "huge_pages": []}
    try:
        for row in progress(rows):
            content["rows"].append(measure(row, row.name in compiled, arguments.seconds))
        again = quantiles(rows, arguments.huge_pages)
        if again:
            content["huge_pages"] = with_huge_pages(again, arguments.seconds)
        content["complete"] = True
    except KeyboardInterrupt:
        print(f"Stopped: {len(content['rows'])} of {len(rows)} rows are done.", file=sys.stderr)
    content["load"]["load_average_after"] = round(os.getloadavg()[0], 2)
    if arguments.out is not None and content["rows"]:
        write(arguments.out, content)
    if arguments.json:
        print(json.dumps(content, allow_nan=False))
    elif content["rows"]:
        from cpu_table import speed_tables

        print(speed_tables(content))
        for reason in sorted({f"{name}: {why}" for row in content["rows"] for name, why in row["skipped"].items()}):
            print(f"Left out in some rows: {reason}", file=sys.stderr)
    if not content["complete"]:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
