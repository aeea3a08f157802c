"""Bring what full comparisons and the null experiment measured into the README and the site.

    steadynorm compare --out sigmoid-mlp
    steadynorm compare --model elu-mlp-20 ... --out elu-mlp-20
    python benchmarks/null_experiment.py
    python benchmarks/microbatch.py
    python benchmarks/measured.py sigmoid-mlp elu-mlp-20

Copies each folder's `results.json` (less the curves) to docs/measured/, and writes the tables between the marks
`<!-- measured -->` and `<!-- /measured -->` of README.md, docs/learn/claims.md and docs/guides/small-batches.md anew.
Without folders it only does the latter, from what docs/measured/ holds. Then it writes the tables of cpu_table.py.
A test checks that the pages say what the files do.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import cpu_table
from steadynorm.report.schema import INITS

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "docs" / "measured"
NETWORKS = {"sigmoid-mlp": "3 × 100 sigmoid", "elu-mlp-20": "20 × 100 ELU"}
PAGES = {"README.md": "readme", "docs/learn/claims.md": "claims", "docs/guides/small-batches.md": "small-batches"}
_BULKY = ("curves", "drift", "ratio_curve")
_BLOCK = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)


def ratio(row: dict[str, Any]) -> str:
    """One ratio with its interval, as a table shows it."""
    if row["ratio"] is None:
        return "neither arrives"
    low, high = row["interval"]
    bounds = "no interval" if low is None and high is None else f"{_times(low, '0')} to {_times(high, '∞')}"
    word = f"{row['method']} " if row["method"] in ("at least", "at most") else ""
    few = min(row["reached_plain"], row["reached_arm"]) < row["seeds"]
    arrived = f"; {row['reached_plain']} and {row['reached_arm']} of {row['seeds']} arrive" if few else ""
    return f"{word}{row['ratio']:.1f} ({bounds}{arrived})"


def _times(bound: float | None, none: str) -> str:
    return none if bound is None else f"{bound:.1f}"


def ratios_table(results: dict[str, dict[str, Any]]) -> str:
    """Times fewer steps with batch norm, by network, place and initialisation."""
    lines = ["| network, batch norm | target | each arm's best | " + " | ".join(f"both {i}" for i in INITS) + " |"]
    lines.append("| --- | --- |" + " --- |" * (len(INITS) + 1))
    for name, found in results.items():
        for arm in dict.fromkeys(row["arm"] for row in found["ratios"]):
            rows = {row["init"]: row for row in found["ratios"] if row["arm"] == arm}
            cells = " | ".join(ratio(rows[init]) for init in ("tuned", *INITS))
            lines.append(f"| {NETWORKS[name]}, {arm} | {100 * found['target']:.1f} % | {cells} |")
    return "\n".join(lines)


def claims_table(results: dict[str, dict[str, Any]]) -> str:
    """The verdict on each claim, by network."""
    lines = ["| claim | " + " | ".join(NETWORKS[name] for name in results) + " |", "| --- |" + " --- |" * len(results)]
    for number, claim in enumerate(next(iter(results.values()))["claims"]):
        cells = [_verdict(found["claims"][number]) for found in results.values()]
        lines.append(f"| {claim['claim']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(claim: dict[str, Any]) -> str:
    if claim["interval"] is None or claim["estimate"] is None:
        return "not measured" if claim["interval"] is None else claim["verdict"]
    low, high = (("∞", "−∞")[side == 0] if b is None else f"{b:.2f}" for side, b in enumerate(claim["interval"]))
    return f"**{claim['verdict']}**: {claim['estimate']:.2f} {claim['unit']} ({low} to {high})"


def null_table(null: dict[str, Any]) -> str:
    """All verdicts of the null experiment."""
    claims = null["summary"]["claims"]
    verdicts = list(next(iter(claims.values()))["verdicts"])
    lines = ["| claim, both networks plain | " + " | ".join(verdicts) + " |", "| --- |" + " --- |" * len(verdicts)]
    lines += [
        f"| {name} | " + " | ".join(str(found["verdicts"][v]) for v in verdicts) + " |"
        for name, found in claims.items()
    ]
    return "\n".join(lines)


def null_sentence(null: dict[str, Any]) -> str:
    """What the null experiment found."""
    found = null["summary"]["any"]
    low, high = (f"{100 * bound:.1f}" for bound in found["interval"])
    settings = null["settings"]
    return (
        f"In {null['summary']['repeats']} comparisons of a plain network with another plain one "
        f"({settings['model']} on {settings['data']}, {settings['optimizer'].capitalize()}, {settings['steps']} steps, "
        f"{settings['seeds']} seeds, tuned on {settings['tuning_seeds']}), {100 * found['supported']:.1f} % called any "
        f"claim supported (95 % interval {low} to {high} %):"
    )


def microbatch_tables(found: dict[str, Any]) -> str:
    """Test accuracy of each arm, and the paired difference to the plain one, by network and order of the examples."""
    labels = found["labels"]
    places = list(dict.fromkeys((row["network"], row["order"]) for row in found["results"]))
    heads = [f"{labels['networks'][network]}, {labels['orders'][order]}" for network, order in places]
    rows = {(row["network"], row["order"], row["arm"]): row for row in found["results"]}
    settings = found["settings"]
    parts = [
        f"Test accuracy in % after {settings['steps']} steps: mean of {settings['seeds']} seeds, and half the width of "
        "its 95 % interval.",
        "Percentage points more than plain, paired by seed, likewise.",
    ]
    for number, (figure, sign) in enumerate((("accuracy", ""), ("over_plain", "+z"))):
        lines = [f"| {settings['microbatch']} at a time | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
        for arm, label in labels["arms"].items():
            if not (sign and arm == "plain"):
                cells = (_half_width(rows[*place, arm][figure], sign) for place in places)
                lines.append(f"| {label} | {' | '.join(cells)} |")
        parts[number] += "\n\n" + "\n".join(lines)
    return "\n\n".join(parts)


def _half_width(figure: list[float | None], sign: str) -> str:
    mean, _, high = figure
    if mean is None or high is None:
        return "not measured" if mean is None else f"{100 * mean:{sign}.1f}"
    return f"{100 * mean:{sign}.1f} ± {100 * (high - mean):.1f}"


def block(page: str) -> str:
    """What stands between the marks of a page."""
    if page == "small-batches":
        return microbatch_tables(json.loads((MEASURED / "microbatch.json").read_text())) + "\n"
    results = {name: json.loads((MEASURED / f"{name}.json").read_text()) for name in NETWORKS}
    parts = [ratios_table(results), claims_table(results)]
    if page == "claims":
        null = json.loads((MEASURED / "null.json").read_text())
        parts += [null_sentence(null), null_table(null)]
    return "\n\n".join(parts) + "\n"


def write_pages() -> None:
    """Writes the tables anew."""
    for path, page in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        changed = _BLOCK.sub(lambda match, page=page: f"{match[1]}{block(page)}{match[2]}", text)
        (ROOT / path).write_text(changed, encoding="utf-8")


def main() -> None:
    """Copies the results named on the command line, then writes the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders that `steadynorm compare` wrote")
    for folder in parser.parse_args().folders:
        results = json.loads((folder / "results.json").read_text())
        kept = {key: value for key, value in results.items() if key not in _BULKY}
        (MEASURED / f"{results['model']['name']}.json").write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    write_pages()
    cpu_table.write_pages()


if __name__ == "__main__":
    main()
