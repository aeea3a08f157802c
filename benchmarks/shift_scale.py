"""How long two large Parquet tables take to compare, and how much memory: JSON on the standard output.

    python benchmarks/shift_scale.py --rows 10000000 --columns 100

Writes both tables into a temporary folder: 80 % standard normal columns, 20 % text of 21 categories; the first column
of the second table is moved by 0.3. Reads them in a process of its own, whose peak of resident memory is reported.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNK = 1_000_000

CHILD = """
import json, resource, sys, time
from steadynorm.shift.reading.scan import scan
start = time.perf_counter()
if sys.argv[1] == "compare":
    from steadynorm.shift import compare
    compare(sys.argv[2], sys.argv[3])
else:
    scan(sys.argv[2], sys.argv[3])
seconds = time.perf_counter() - start
used = resource.getrusage(resource.RUSAGE_SELF)
cpu = used.ru_utime + used.ru_stime
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": used.ru_maxrss * 1024}))
"""


def generate(folder: Path, rows: int, columns: int, seed: float, moved: float) -> None:
    """One table as files of at most a million rows."""
    import duckdb

    folder.mkdir()
    texts = columns // 5
    normal = "sqrt(-2 * ln(1 - random())) * cos(6.283185307179586 * random())"
    expressions = [f"{normal} + {moved if i == 0 else 0} as x{i}" for i in range(columns - texts)]
    expressions += [f"(random() * 20)::int::varchar as c{i}" for i in range(texts)]
    # A row group of every column is in memory while it is written, once per thread: about 100 MB.
    options = f"format parquet, row_group_size {max(2_048, 12_000_000 // columns)}"
    limits = {"memory_limit": "2GB", "temp_directory": str(folder.parent / "spilled")}
    with duckdb.connect(":memory:", config=limits) as connection:
        connection.execute(f"select setseed({seed})")
        for part, start in enumerate(range(0, rows, CHUNK)):
            values = f"select {', '.join(expressions)} from range({min(CHUNK, rows - start)})"
            connection.execute(f"copy ({values}) to '{folder / f'{part:04}.parquet'}' ({options})")


def measured(command: str, reference: Path, current: Path) -> dict[str, float]:
    """Seconds by the clock and of the cores, and the peak of resident bytes, of a process that does nothing else."""
    found = subprocess.run(
        [sys.executable, "-c", CHILD, command, str(reference), str(current)], capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout)


def main() -> None:
    """Generates, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each table")
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--command", choices=["scan", "compare"], default="scan", help="reading alone, or all")
    parser.add_argument("--folder", type=Path, help="where the tables go, by default a temporary folder; kept if named")
    parser.add_argument("--out", type=Path, help="a JSON file to add the result to, such as that of the guide's table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shift-scale-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tables = [folder / f"{name}-{options.rows}x{options.columns}" for name in ("reference", "current")]
        missing, start = [table for table in tables if not table.exists()], time.perf_counter()
        for i, table in enumerate(tables):
            if table in missing:
                generate(table, options.rows, options.columns, 0.25 * (i + 1), 0.3 * i)
        generated = time.perf_counter() - start if len(missing) == len(tables) else None
        bytes_on_disk = sum(file.stat().st_size for table in tables for file in table.iterdir())
        result = {
            "command": options.command,
            "rows": options.rows,
            "columns": options.columns,
            "bytes_on_disk": bytes_on_disk,
            "generating_seconds": generated,
            **measured(options.command, *tables),
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        }
    print(json.dumps(result, indent=2))
    if options.out is not None:
        rows = json.loads(options.out.read_text()) if options.out.exists() else []
        key = ("command", "rows", "columns")
        rows = [row for row in rows if any(row[name] != result[name] for name in key)] + [result]
        options.out.write_text(json.dumps(sorted(rows, key=lambda row: row["rows"] * row["columns"]), indent=1) + "\n")


if __name__ == "__main__":
    main()
