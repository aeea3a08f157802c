"""How often `steadynorm compare` would praise batch norm where there is none: both arms plain, many times over.

    python benchmarks/null_experiment.py [--repeats 40] [--jobs 1]

Each repeat is a whole comparison on its own seeds between two arms that differ in initialisation and data order alone:
the same search, the same fresh seeds, the same six verdicts. Where the standardisation study would put batch norm on
the raw features it puts nothing. So whatever comes out as supported is a false alarm, chance and the choices made while
tuning included.

Smaller than a comparison meant to be read, so that forty of them end within the hour on one core: Adam brings the
sigmoid network near its plateau in 200 steps; six fresh and two tuning seeds leave more to chance than `compare`'s own
ten and three.

The file is rewritten after each repeat. The same call goes on where an interrupted one stopped; one with other settings
refuses to mix with what is there. Ends with code 1 if a claim was supported in more than 5 % of the repeats.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from steadynorm.experiment import Arm, compare
from steadynorm.experiment.claims import STATEMENTS

ARMS = (Arm("plain", "without batch norm"), Arm("before", "without batch norm, again", salt=1))
STUDIES = ("gradients", "timing", "dropout", "standardisation")  # those that a claim rests on
SEEDS_APART = 10_000  # between the first seeds of two repeats; the first repeat stays clear of `compare`'s own seeds
ALLOWED = 0.05
VERDICTS = ("supported", "contradicted", "no material difference", "cannot tell")
ROOT = Path(__file__).resolve().parent.parent


def one_repeat(number: int, settings: dict[str, Any], jobs: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Runs one comparison; returns what it made of each claim, and where it ran."""
    begun = time.perf_counter()
    first_seed = (number + 1) * SEEDS_APART
    results = compare(arms=ARMS, studies=STUDIES, first_seed=first_seed, jobs=jobs, progress=False, **settings).results
    claims = {c["id"]: {key: c[key] for key in ("verdict", "estimate", "interval")} for c in results["claims"]}
    # What tuning chose says whether a false alarm came from there.
    chosen = [{key: c[key] for key in ("arm", "purpose", "init", "lr")} for c in results["choices"]]
    chosen += [
        {"arm": r["arm"], "purpose": f"dropout {r['dropout']:g}", "lr": r["lr"]} for r in results["regularization"]
    ]
    repeat = {
        "first_seed": first_seed,
        "target": results["target"],
        "claims": claims,
        "choices": chosen,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    return repeat, results["environment"]


def summarise(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of verdicts per claim, and the share of repeats with a false alarm, with its 95 % interval."""

    def share(alarms: int) -> dict[str, Any]:
        low, high = binomtest(alarms, len(repeats)).proportion_ci(method="exact")
        return {"supported": alarms / len(repeats), "interval": [float(low), float(high)]}

    verdicts = {s.id: Counter(r["claims"][s.id]["verdict"] for r in repeats) for s in STATEMENTS}
    any_claim = sum(any(c["verdict"] == "supported" for c in r["claims"].values()) for r in repeats)
    return {
        "repeats": len(repeats),
        "any": share(any_claim),
        "claims": {
            name: {"verdicts": {v: counts[v] for v in VERDICTS}, **share(counts["supported"])}
            for name, counts in verdicts.items()
        },
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as text."""
    lines = [f"{'claim':16}" + "".join(f"{v:>24}" for v in VERDICTS) + "   share supported (95 %)"]
    for name, claim in summary["claims"].items():
        counts = "".join(f"{claim['verdicts'][v]:>24}" for v in VERDICTS)
        lines.append(f"{name:16}{counts}   {percent(claim)}")
    lines.append(f"any of the six, over {summary['repeats']} repeats: {percent(summary['any'])}")
    return "\n".join(lines)


def percent(share: dict[str, Any]) -> str:
    """A share with its exact binomial interval."""
    return f"{share['supported']:6.1%} ({share['interval'][0]:.1%} to {share['interval'][1]:.1%})"


def read(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The repeats that an earlier call finished."""
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    if before["settings"] != settings:
        sys.exit(f"{path} holds repeats with other settings: {before['settings']}. Choose another --out or remove it.")
    return before["results"]


def write(path: Path, content: dict[str, Any]) -> None:
    """Puts the file in place as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(path)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=1, help="worker processes; changes no number but the seconds")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="sigmoid-mlp")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="adam")
    parser.add_argument("--steps", type=int, default=200, help="per run")
    parser.add_argument("--seeds", type=int, default=6, help="fresh seeds per repeat")
    parser.add_argument("--tuning-seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measured" / "null.json")
    return parser.parse_args()


def main() -> None:
    """Runs the repeats that are still missing, then prints the table."""
    args = arguments()
    settings = {name: getattr(args, name) for name in ("data", "model", "optimizer", "steps", "seeds", "tuning_seeds")}
    repeats = read(args.out, settings)
    for number in range(len(repeats), args.repeats):
        repeat, environment = one_repeat(number, settings, args.jobs)
        repeats.append(repeat)
        summary = summarise(repeats)
        write(args.out, {"settings": settings, "environment": environment, "summary": summary, "results": repeats})
        supported = [name for name, claim in repeat["claims"].items() if claim["verdict"] == "supported"]
        left = (args.repeats - number - 1) * repeat["seconds"] / 60
        print(
            f"repeat {number + 1} of {args.repeats}: {repeat['seconds']:.0f} s, about {left:.0f} min left; "
            f"supported: {', '.join(supported) or 'none'}",
            file=sys.stderr,
        )
    summary = summarise(repeats)
    print(table(summary))
    sys.exit(any(claim["supported"] > ALLOWED for claim in summary["claims"].values()))


if __name__ == "__main__":
    main()
