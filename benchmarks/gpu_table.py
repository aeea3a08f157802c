"""A short table and four verdicts from what `benchmarks/gpu.py` has measured."""

import math
from typing import Any

__all__ = ["summary", "verdicts"]

STREAMING = 64e6  # bytes of x, from where on it cannot stay in the cache
WANTED = {"eager": 1.5, "compiled": 1.0, "bandwidth": 0.8, "step": 0.08}


def geometric_mean(values: list[float]) -> float | None:
    """None of nothing."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


def _median(row: dict[str, Any], which: str, who: str) -> float | None:
    times = row["times_us"][which].get(who)
    return None if times is None else times[1]


def _ratios(rows: list[dict[str, Any]], who: str) -> list[float]:
    """How many times as long as ours the contender's forward + backward takes, row by row."""
    pairs = [(_median(row, "both", who), _median(row, "both", "ours")) for row in rows]
    return [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]


def _bandwidths(rows: list[dict[str, Any]]) -> list[float]:
    """Bytes that must move in a streaming row, over the time it takes, in units of the copy's."""
    found = []
    for row in rows:
        ours = _median(row, "both", "ours")
        if row["x_bytes"] > STREAMING and ours is not None:
            copied = row["copy_bytes"] / row["copy_us"][1]
            found.append(sum(row["bytes_moved"].values()) / ours / copied)
    return found


def verdicts(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was wanted, what was measured and whether that is met; "not measured" where nothing speaks to it."""
    rows = [row for row in content["rows"] if row["variant"] == "relu" and "times_us" in row]
    step = content["step"]
    measured = [
        (
            "BN + ReLU, forward + backward, against torch.nn",
            "eager",
            geometric_mean(_ratios(rows, "eager")),
            "x",
        ),
        ("the same against torch.compile", "compiled", geometric_mean(_ratios(rows, "compiled")), "x"),
        ("share of the copy's bandwidth over 64 MB", "bandwidth", geometric_mean(_bandwidths(rows)), "%"),
        ("ResNet-50's step, faster by", "step", None if step is None else step["faster"], "%"),
    ]
    return [
        (f"{what} (wanted {_shown(WANTED[key], unit)})", _shown(found, unit), _verdict(found, WANTED[key]))
        for what, key, found, unit in measured
    ]


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    return f"{100 * value:.0f} %" if unit == "%" else f"{value:.2f} x"


def _verdict(found: float | None, wanted: float) -> str:
    return "" if found is None else "met" if found >= wanted else "MISSED"


def summary(content: dict[str, Any]) -> str:
    """Medians by dtype, layout and variant, then the verdicts."""
    lines = [f"{content['machine']['device']}, {len(content['rows'])} rows, forward + backward", ""]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        if "times_us" in row:
            groups.setdefault((row["dtype"], row["layout"], row["variant"]), []).append(row)
    lines.append(f"{'':34}{'rows':>5}{'torch.nn':>10}{'compile':>9}{'tuned':>7}{'of copy':>9}{'host us':>9}")
    for key, rows in sorted(groups.items()):
        ratios = [geometric_mean(_ratios(rows, who)) for who in ("eager", "compiled", "tuned")]
        of_copy = geometric_mean(_bandwidths(rows))
        host = sorted(row["host_us"]["ours"][1] for row in rows)[len(rows) // 2]
        cells = [
            f"{'-' if r is None else format(r, '.2f') + 'x':>{w}}" for r, w in zip(ratios, (10, 9, 7), strict=True)
        ]
        share = "-" if of_copy is None else f"{100 * of_copy:.0f} %"
        lines.append(f"{' '.join(key):34}{len(rows):>5}{''.join(cells)}{share:>9}{host:>9.0f}")
    wrong = [f"{row['name']}: {row['wrong']}" for row in content["rows"] if "wrong" in row]
    if wrong:
        lines += ["", "WRONG, hence not timed:", *wrong]
    lines += ["", *(f"{what:70}{found:>14}  {verdict}".rstrip() for what, found, verdict in verdicts(content))]
    return "\n".join(lines)
