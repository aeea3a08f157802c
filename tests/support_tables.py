"""Tables for the tests of covariate shift: one set of rows, in memory and in every kind of file."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

Rows = dict[str, list[Any]]


def rows(n: int = 400, seed: int = 0) -> Rows:
    """Numbers with a missing one and an infinite one, whole numbers, categories, free text."""
    rng = np.random.default_rng(seed)
    x: list[Any] = (rng.normal(size=n) * 3 + 100).tolist()
    x[3] = None
    return {
        "x": x,
        "whole": rng.integers(-5, 50, n).tolist(),
        "colour": [["red", "green", "blue", None][i] for i in rng.integers(0, 4, n)],
        "note": [f"{i} " + "word " * int(k) for i, k in enumerate(rng.integers(0, 9, n))],
    }


def write(table: Rows, path: Path) -> Path:
    """In the format that the path's name asks for."""
    names = list(table)
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix in (".parquet", ".arrow", ".feather"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrow = pa.table(table)
        if suffix == ".parquet":
            pq.write_table(arrow, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, arrow.schema) as writer:
                writer.write_table(arrow, max_chunksize=100)
        return path
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        records = list(zip(*table.values(), strict=True))
        if suffix in (".csv", ".tsv"):
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerow(names)
            writer.writerows(records)
        else:
            file.writelines(json.dumps(dict(zip(names, record, strict=True))) + "\n" for record in records)
    return path
