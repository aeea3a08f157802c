"""Bring what benchmarks/cpu.py and benchmarks/training_steps.py measured into the README and the site.

    python benchmarks/cpu_table.py

Reads benchmarks/results/cpu.json and training_steps.json, writes the tables between the marks `<!-- speed -->` and
`<!-- /speed -->` of README.md and docs/guides/speed.md anew, and draws docs/assets/speed.svg. What has not been
measured leaves its block empty. A test checks that the pages say what the files do.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cpu_rows import BANDS, PASSES, VARIANTS, band

__all__ = ["block", "geometric_mean", "speed_tables", "training_table", "write_pages"]

Rows = list[dict[str, Any]]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {"README.md": "readme", "docs/guides/speed.md": "speed"}
LAYOUTS = {"contiguous": "contiguous", "channels_last": "channels last"}
PEERS = {  # as the heads of columns name them
    "eager": "`torch.nn`",
    "in_place": "`torch.nn`, in place",
    "onednn": "oneDNN",
    "compiled": "`torch.compile`",
}
MODELS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "mobilenet_v2": "MobileNet-V2"}
NONE = "–"
_BLOCK = re.compile(r"(<!-- speed -->\n).*?(<!-- /speed -->)", re.DOTALL)


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log v)): the mean that fits ratios, whose inverse is the mean of the inverses.

    Raises:
        ValueError: there are no values.
    """
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("a geometric mean needs one value at least")
    return math.exp(math.fsum(logs) / len(logs))


def over(rows: Rows, which: str, slower: str, faster: str) -> list[float]:
    """The ratio of the medians of two contenders, in the rows where both were timed."""
    times = [row["passes"][which]["times_us"] for row in rows]
    return [t[slower][1] / t[faster][1] for t in times if slower in t and faster in t]


def matching(rows: Rows, **wanted: str) -> Rows:
    """The rows with these values; `band` is that of their size."""
    return [row for row in rows if all((row | {"band": band(row["x_bytes"])})[k] == v for k, v in wanted.items())]


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rules = ["---"] * len(heads)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rules, *lines))


def mean_cell(values: list[float]) -> str:
    """A geometric mean, or a dash."""
    return f"{geometric_mean(values):.2f}" if values else NONE


def band_lines(groups: dict[str, Rows], which: str, cells: Callable[[Rows], list[str]]) -> list[list[str]]:
    """A line for each group and band that has rows: its name, the number of rows, how far from the floor, and more."""
    lines: list[list[str]] = []
    for label, rows in groups.items():
        for size, name in BANDS.items():
            inside = matching(rows, band=size)
            if inside:
                floor = [mean_cell(over(inside, which, peer, "floor")) for peer in ("ours", "eager")]
                lines.append([f"{label}{name}", str(len(inside)), *floor, *cells(inside)])
    return lines


def readme_table(rows: Rows) -> str:
    """Forward + backward of BN + ReLU in float32, by bands."""
    main = matching(rows, dtype="float32", variant="relu")
    lines = band_lines({"": main}, "both", lambda inside: [faster(inside, "both", p) for p in ("eager", "compiled")])
    return table(
        ["size of x", "inputs", "time / copy", "`torch.nn` / copy", "faster than `torch.nn`", "than `torch.compile`"],
        lines,
    )


def faster(rows: Rows, which: str, peer: str) -> str:
    """How many times as fast as a peer, and in how many rows where that is not all of them."""
    found = over(rows, which, peer, "ours")
    few = f" ({len(found)})" if 0 < len(found) < len(rows) else ""
    return mean_cell(found) + (f" ×{few}" if found else "")


def full_table(rows: Rows, which: str, dtype: str) -> str:
    """Every band, variant and layout of one dtype, against every peer; and the row where `torch.nn` comes nearest."""
    groups = {
        f"{VARIANTS[variant]}, {LAYOUTS[layout]}, ": matching(rows, dtype=dtype, variant=variant, layout=layout)
        for variant in ("relu", "plain", "add_relu")
        for layout in LAYOUTS
    }

    def cells(inside: Rows) -> list[str]:
        nearest = min(over(inside, which, "eager", "ours"), default=None)
        return [*(faster(inside, which, peer) for peer in PEERS), NONE if nearest is None else f"{nearest:.2f} ×"]

    heads = [
        "",
        "rows",
        "steadynorm / floor",
        "`torch.nn` / floor",
        *(f"faster than {name}" for name in PEERS.values()),
    ]
    return table([*heads, "least over `torch.nn`"], band_lines(groups, which, cells))


def memory_table(rows: Rows) -> str:
    """What is kept for backward, in units of x."""
    lines: list[list[str]] = []
    for variant, label in VARIANTS.items():
        # Per-channel terms are a matter of small inputs.
        inside = [
            row for row in matching(rows, variant=variant) if row["kept_bytes"] and band(row["x_bytes"]) != "small"
        ]
        if inside:
            kept = [
                f"{geometric_mean(row['kept_bytes'][peer] / row['x_bytes'] for row in inside):.2f}"
                for peer in ("ours", "eager")
            ]
            lines.append([label, str(len(inside)), *kept])
    return table(["kept for backward, in units of x", "rows", "steadynorm", "`torch.nn`"], lines)


def huge_pages_table(rows: Rows, again: Rows) -> str:
    """Milliseconds of forward + backward without and with huge pages for the whole process."""
    before = {row["name"]: row for row in rows}
    lines: list[list[str]] = []
    for row in again:
        if row["name"] in before:
            pair = [entry["passes"]["both"]["times_us"] for entry in (before[row["name"]], row)]
            figures = [f"{t[peer][1] / 1e3:.3g}" for t in pair for peer in ("ours", "eager", "floor")]
            shape = "×".join(map(str, row["shape"]))
            lines.append([f"{shape}, {LAYOUTS[row['layout']]}", *figures])
    names = ("steadynorm", "`torch.nn`", "copy")
    return table(["ms", *names, *(f"{name}, huge pages" for name in names)], lines)


def training_table(steps: dict[str, Any]) -> str:
    """Milliseconds of a training step, and memory kept for its backward, with torch's layers and with ours."""
    lines = []
    for row in steps["rows"]:
        theirs, ours = (row["times_ms"][peer][1] for peer in ("eager", "ours"))
        kept = [f"{row['kept_bytes'][peer] / 1e6:.0f}" for peer in ("eager", "ours")]
        what = f"{MODELS[row['model']]}, {'×'.join(map(str, row['shape']))}, {LAYOUTS[row['layout']]}"
        lines.append([what, f"{theirs:.0f}", f"{ours:.0f}", f"{100 * (1 - ours / theirs):.0f} %", *kept])
    heads = [
        "training step",
        "`torch.nn`, ms",
        "steadynorm, ms",
        "time saved",
        "`torch.nn` keeps, MB",
        "steadynorm keeps, MB",
    ]
    return table(heads, lines)


def setting(measured: dict[str, Any]) -> str:
    """On what machine, with which versions; the file has more."""
    at = measured["machine"]
    versions = [f"{name} {at['versions'][name]}" for name in ("torch", "numba") if at["versions"][name]]
    return ", ".join([at["processor"], f"{at['threads']} threads", *versions, at["date"]])


def speed_tables(measured: dict[str, Any]) -> str:
    """All of a run of benchmarks/cpu.py."""
    rows = measured["rows"]
    caches = ", ".join(f"{level} {size}" for level, size in measured["machine"]["caches"].items())
    parts = [f"{len(rows)} inputs. {setting(measured)}. Caches: {caches or 'unknown'}."]
    for which, label in PASSES.items():
        for dtype in dict.fromkeys(row["dtype"] for row in reversed(rows)):
            parts.append(f"{label.capitalize()}, {dtype}:\n\n{full_table(rows, which, dtype)}")
    parts.append(memory_table(rows))
    if measured["huge_pages"]:
        parts.append(huge_pages_table(rows, measured["huge_pages"]))
    return "\n\n".join(parts)


def readme_block(speed: dict[str, Any] | None, steps: dict[str, Any] | None) -> str:
    """Bands and training steps, and where."""
    parts: list[str] = []
    if speed:
        parts += [f"Forward + backward of BN + ReLU, float32 ({setting(speed)}):", readme_table(speed["rows"])]
    if steps:
        parts.append(training_table(steps))
    return "\n\n".join(parts)


def speed_block(speed: dict[str, Any] | None, steps: dict[str, Any] | None) -> str:
    """Everything, with the picture."""
    parts: list[str] = []
    if speed:
        parts += ["![Time over that of a copy, against the size of x](../assets/speed.svg)", speed_tables(speed)]
    if steps:
        parts += [f"Training steps ({setting(steps)}):", training_table(steps)]
    return "\n\n".join(parts)


def loaded(path: Path) -> dict[str, Any] | None:
    """A file of results, where it is there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def block(page: str, results: Path = RESULTS) -> str:
    """What stands between the marks of a page."""
    found = loaded(results / "cpu.json"), loaded(results / "training_steps.json")
    text = {"readme": readme_block, "speed": speed_block}[page](*found)
    return f"{text}\n" if text else ""


def write_pages(root: Path = ROOT, results: Path = RESULTS) -> None:
    """Writes the tables anew and draws the picture, of whatever has been measured."""
    for path, page in PAGES.items():
        text = (root / path).read_text(encoding="utf-8")
        changed = _BLOCK.sub(lambda match, page=page: f"{match[1]}{block(page, results)}{match[2]}", text)
        aside = (root / path).with_suffix(".part")
        aside.write_text(changed, encoding="utf-8")
        aside.replace(root / path)
    speed = loaded(results / "cpu.json")
    if speed:
        from cpu_picture import draw

        draw(speed, root / "docs" / "assets" / "speed.svg")


if __name__ == "__main__":
    write_pages()
