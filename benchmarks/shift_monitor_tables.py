"""What `shift_monitor.py` has measured, as the tables of docs/guides/monitor.md."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def percent(share: Mapping[str, Any]) -> str:
    """Share, interval and worst calibration."""
    low, high = (f"{100 * bound:.1f}" for bound in share["interval"])
    return f"{100 * share['share']:.1f} % ({low} to {high}; worst {100 * share['worst']:.0f} %)"


def reached(row: Mapping[str, Any]) -> str:
    """Median delay, or how many streams alarmed where it is not half of them; with those that did not."""
    if row["median"] is None:
        return f"> {row['horizon']} ({100 * row['alarmed']:.0f} %)"
    return f"{row['median']:g}" + ("" if row["alarmed"] == 1 else f" ({100 * row['alarmed']:.0f} %)")


def tables(found: Mapping[str, Any]) -> str:
    """Everything measured, as the guide prints it."""
    parts: list[str] = []
    for name, model in found["models"].items():
        parts.append(f"### {name}: {model['held_out']:,} held-out images, accuracy {model['accuracy']:.1%}\n")
        if "false_alarms" in model:
            head = ["recipe", "batch size", "alarm within 100 batches", "within 1,000"]
            rows = [
                [r["recipe"], str(r["batch_size"]), percent(r["tenth"]), percent(r["whole"])]
                for r in model["false_alarms"]
            ]
            parts.append(table(head, rows))
        if "correlated" in model:
            found_rows = model["correlated"]
            rows = [
                [how, percent(found_rows[how]["tenth"]), percent(found_rows[how]["whole"])]
                for how in ("block estimated", "block=1")
            ]
            parts.append(table(["runs of ten of one class, batches of 64", "within 100", "within 1,000"], rows))
        if "delays" in model:
            by = {(r["corruption"], r["severity"]): r for r in model["delays"]}
            severities = sorted({r["severity"] for r in model["delays"]})
            sizes = [key for key in model["delays"][0] if key.isdigit()]
            names = list(dict.fromkeys(r["corruption"] for r in model["delays"]))
            for size in sizes:
                rows = [[c.replace("_", " "), *(reached(by[c, s][size]) for s in severities)] for c in names]
                parts.append(table([f"batches of {size}", *(f"severity {s}" for s in severities)], rows))
            rows = [[c.replace("_", " "), *(f"{by[c, s]['accuracy']:.1%}" for s in severities)] for c in names]
            parts.append(table(["accuracy", *(f"severity {s}" for s in severities)], rows))
        if "peers" in model:
            own = {f"{r['corruption']} {r['severity']}": reached(r["64"]) for r in model.get("delays", [])}
            rows = [
                [r["stream"].replace("_", " "), own.get(r["stream"], ""), reached(r["ks"]), reached(r["mmd"])]
                for r in model["peers"]
            ]
            parts.append(table(["stream, batches of 64", "Monitor", "KS", "MMD"], rows))
        if "cost" in model:
            rows = [
                [
                    str(r["batch_size"]),
                    f"{r['forward_ms']:.2g} ms",
                    *(
                        f"{r[k]['cost']:.1%} ({r[k]['interval'][0]:.1%} to {r[k]['interval'][1]:.1%})"
                        for k in ("budget 3 %", "everything")
                    ),
                    f"{r['budget 3 %']['observed']:.1%}",
                ]
                for r in model["cost"]
            ]
            parts.append(
                table(["batch size", "forward", "cost, budget 3 %", "cost, everything", "batches looked at"], rows)
            )
    return "\n".join(parts)
