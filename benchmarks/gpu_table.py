"""A short table and four verdicts from what `benchmarks/gpu.py` has measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Verdict", "shares", "summary", "verdicts"]

STREAMING = 64e6  # bytes of x, from where on it cannot stay in the cache
WANTED = {"eager": 1.5, "compiled": 1.0, "bandwidth": 0.8, "step": 0.08}
PASSES = ("forward", "backward", "both")
HOPPER = "9."


@dataclass(frozen=True)
class Verdict:
    """An aim, the figure measured for it, and whether it is met: "" where nothing was measured."""

    aim: str
    figure: str
    word: str


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


def ratios(rows: Sequence[dict[str, Any]], *peers: str, which: str = "both") -> list[float]:
    """How many times as long as ours the fastest of these peers takes, row by row, where any was timed."""
    found: list[float] = []
    for row in rows:
        times = row["times_us"][which]
        theirs = [times[peer][1] for peer in peers if peer in times]
        if theirs:
            found.append(min(theirs) / times["ours"][1])
    return found


def shares(rows: Sequence[dict[str, Any]], which: str = "both") -> list[float]:
    """Of every row over 64 MB: the bytes that must move, over the time it takes, in units of the copy's."""
    found: list[float] = []
    for row in rows:
        if row["x_bytes"] > STREAMING:
            moved = row["bytes_moved"]
            needed = moved[which] if which in moved else sum(moved.values())
            copied = row["copy_bytes"] / row["copy_us"][1]
            found.append(needed / row["times_us"][which]["ours"][1] / copied)
    return found


def timed(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that have been found right and timed."""
    return [row for row in content["rows"] if "times_us" in row]


def verdicts(content: dict[str, Any]) -> list[Verdict]:
    """One for each aim. Of torch.compile the faster mode of a row counts, of the bandwidth every streaming row."""
    plain = [row for row in timed(content) if row["variant"] == "relu"]
    found = [
        _over("BN + ReLU, forward + backward: torch.nn over ours", ratios(plain, "eager"), "eager"),
        _over("the same: the faster torch.compile over ours", ratios(plain, "compiled", "tuned"), "compiled"),
    ]
    aim = f"each over {STREAMING / 1e6:.0f} MB: of a copy's bandwidth (wanted {100 * WANTED['bandwidth']:.0f} %)"
    reached = shares(timed(content))
    if reached:
        enough = sum(share >= WANTED["bandwidth"] for share in reached)
        figure = f"{_percent(geometric_mean(reached))}, least {_percent(min(reached))}, {enough} of {len(reached)}"
        found.append(Verdict(aim, figure, _word(enough == len(reached))))
    else:
        found.append(Verdict(aim, "not measured", ""))
    aim = f"ResNet-50's training step, faster by (wanted {100 * WANTED['step']:.0f} %)"
    step = content["step"]
    if step is None or "not_timed" in step:
        found.append(Verdict(aim, "not measured", ""))
    elif "wrong" in step:
        found.append(Verdict(aim, "WRONG", _word(False)))
    else:
        found.append(Verdict(aim, f"{100 * step['faster']:.1f} %", _word(step["faster"] >= WANTED["step"])))
    return found


def _over(aim: str, values: list[float], key: str) -> Verdict:
    mean = geometric_mean(values)
    aim = f"{aim} (wanted {WANTED[key]:.1f})"
    if mean is None:
        return Verdict(aim, "not measured", "")
    met = mean >= WANTED[key] if key == "eager" else mean > WANTED[key]
    return Verdict(aim, f"{mean:.2f}, of {len(values)} rows", _word(met))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _word(met: bool) -> str:
    return "met" if met else "MISSED"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _middle(rows: Sequence[dict[str, Any]], key: str, who: str) -> str:
    found = sorted(row[key][who][1] for row in rows if who in row[key])
    return f"{found[len(found) // 2]:.0f}" if found else "-"


HEADS = ("rows", "fwd", "bwd", "both", "compile", "tuned", "fwd", "bwd", "both", "ours", "nn", "ours", "nn")
WIDTHS = (5, 7, 7, 7, 8, 7, 7, 6, 6, 7, 6, 7, 6)


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:33}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def summary(content: dict[str, Any]) -> str:
    """Means by dtype, layout and variant, then what went wrong, then the verdicts."""
    about = content["machine"]
    rows = timed(content)
    heads = f"{'':38}{'torch.nn over ours':>21}{'over ours':>15}{'% of a copy':>19}{'host us':>13}{'graph us':>13}"
    lines = [f"{about['device']}: {len(rows)} rows, each contender's median", "", heads, _line("", HEADS)]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["layout"], row["variant"]), []).append(row)
    for key, members in sorted(groups.items()):
        means = [geometric_mean(ratios(members, "eager", which=which)) for which in PASSES]
        means += [geometric_mean(ratios(members, who)) for who in ("compiled", "tuned")]
        parts = [geometric_mean(shares(members, which)) for which in PASSES]
        cells = [str(len(members)), *map(_times, means), *("-" if p is None else f"{100 * p:.0f}" for p in parts)]
        cells += [_middle(members, figure, who) for figure in ("host_us", "graph_us") for who in ("ours", "eager")]
        lines.append(_line(" ".join(key), cells))
    lines += ["", *_troubles(content), *(_spelled(verdict) for verdict in verdicts(content))]
    if "capability" in about and not about["capability"].startswith(HOPPER):
        lines.append(f"(The aims are for Hopper, capability 9.0; this device has {about['capability']}.)")
    return "\n".join(lines)


def _spelled(verdict: Verdict) -> str:
    return f"{verdict.aim:76}{verdict.figure:>32}  {verdict.word}".rstrip()


def _troubles(content: dict[str, Any]) -> list[str]:
    found = [f"WRONG, hence not timed: {row['name']}: {row['wrong']}" for row in content["rows"] if "wrong" in row]
    found += [f"not timed: {row['name']}: {row['not_timed']}" for row in content["rows"] if "not_timed" in row]
    for row in timed(content):
        found += [f"without {name}: {row['name']}: {reason}" for name, reason in row["skipped"].items()]
    late = sum(bool(row["late"]) for row in timed(content))
    if late:
        found.append(f"in {late} rows the host was late at times, so that gaps between kernels are timed too")
    step = content["step"] or {}
    if "wrong" in step:
        found.append(f"WRONG, hence not timed: the training step: {step['wrong']}")
    if "not_timed" in step:
        found.append(f"not timed: the training step: {step['not_timed']}")
    if content.get("failed"):
        found.append(f"ENDED EARLY: {content['failed']}")
    return [*found, ""] if found else []
