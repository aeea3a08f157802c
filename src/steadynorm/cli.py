"""The command line: `steadynorm compare | explain | shift | diagnose | recalibrate | fold | check`.

Exit codes: 0 done; 1 a shift, a finding or an unsafe switch, where `--fail-on-shift`, `--fail-on` or `--fail-on-unsafe`
asks for it; 2 bad input, with one line saying what was wrong and what to do; 130 interrupted (what was finished is
kept).
"""

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

import steadynorm as sn
from steadynorm.commands.check import EXAMPLES as CHECK_EXAMPLES
from steadynorm.commands.check import check
from steadynorm.commands.diagnose import EXAMPLES as DIAGNOSE_EXAMPLES
from steadynorm.commands.diagnose import diagnose
from steadynorm.commands.fold import EXAMPLES as FOLD_EXAMPLES
from steadynorm.commands.fold import fold
from steadynorm.commands.recalibrate import EXAMPLES as RECALIBRATE_EXAMPLES
from steadynorm.commands.recalibrate import recalibrate
from steadynorm.errors import ArgumentError, SteadynormError

if TYPE_CHECKING:
    from steadynorm.experiment import Arm

__all__ = ["app", "main"]

app = typer.Typer(
    name="steadynorm",
    help="Batch normalization: see what it does to one mini-batch, and what it does for a whole training run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_JSON = typer.Option("--json", help="Print the result as JSON, for machines; nothing else goes to standard output.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steadynorm {sn.__version__}")
        raise typer.Exit


@app.callback()
def _root(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch normalization: see what it does to one mini-batch, and what it does for a whole training run."""


@app.command(
    # So that a negative number is a value and not a misspelt option.
    context_settings={"ignore_unknown_options": True},
    epilog="Examples:  steadynorm explain 3 5 8 9 11 24   |   steadynorm explain --csv batch.csv --gamma 2 --json",
)
def explain(
    values: Annotated[
        list[str] | None, typer.Argument(help="The mini-batch of one feature: two numbers or more.")
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(help="Read the mini-batch from a CSV file instead: a row an example, a column a feature."),
    ] = None,
    gamma: Annotated[str, typer.Option(help="The scale γ: one number, or one a feature, separated by commas.")] = "1",
    beta: Annotated[str, typer.Option(help="The shift β, likewise.")] = "0",
    eps: Annotated[str, typer.Option(help="ε, added to the variance.")] = "1e-5",
    momentum: Annotated[str, typer.Option(help="The share of this batch in the running statistics.")] = "0.1",
    digits: Annotated[int, typer.Option(help="Digits after the point, all of them right.", min=1, max=50)] = 6,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Take one mini-batch through batch norm, step by step, right in every digit shown."""
    from steadynorm import walkthrough

    if (csv is None) == (not values):
        raise ArgumentError("give the values of one feature, or --csv FILE with several: one of the two.")
    options: dict[str, Any] = {"eps": eps, "momentum": momentum, "digits": digits}
    options |= {"gamma": _one_or_several(gamma), "beta": _one_or_several(beta)}
    steps = walkthrough.from_csv(csv, **options) if csv else walkthrough.explain(values or [], **options)
    typer.echo(json.dumps(steps.to_dict(), indent=2, allow_nan=False) if as_json else str(steps))


def _one_or_several(text: str) -> Any:
    return text.split(",") if "," in text else text


@app.command(
    epilog="Examples:  steadynorm compare   |   steadynorm compare --model elu-mlp-20   |   "
    "steadynorm compare --data table.csv --label species --model relu-mlp   |   "
    "steadynorm compare --data mypkg.data:load --model mypkg.nets:build --out report"
)
def compare(
    data: Annotated[
        str,
        typer.Option(
            help="digits (bundled), a folder of MNIST-style idx files, a folder of images (one sub-folder per class), "
            "a CSV, TSV, Parquet or JSON-lines table, an .npz file, or pkg.mod:factory."
        ),
    ] = "digits",
    label: Annotated[str | None, typer.Option(help="The table's label column.")] = None,
    model: Annotated[
        str, typer.Option(help="sigmoid-mlp, elu-mlp-20, relu-mlp, small-cnn, or pkg.mod:factory.")
    ] = "sigmoid-mlp",
    seeds: Annotated[int, typer.Option(help="Fresh seeds that everything reported is measured on.", min=2)] = 10,
    tuning_seeds: Annotated[int, typer.Option(help="Other seeds that settings are chosen on.", min=1)] = 3,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps of a run; 2000 by default, 400 for elu-mlp-20.", min=10)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a step.", min=2)] = 60,
    target: Annotated[
        str, typer.Option(help="Validation accuracy to reach, in (0, 1); auto: 99 % of what the plain network reaches.")
    ] = "auto",
    optimizer: Annotated[str, typer.Option(help="sgd or adam.")] = "sgd",
    arms: Annotated[
        str | None, typer.Option(help="Arms: plain, and before, after or both, separated by commas; by default all.")
    ] = None,
    studies: Annotated[
        str | None,
        typer.Option(help="Which studies beside the comparison itself, separated by commas; all by default."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes; one per core by default. Changes no number.", min=1)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.json and the best model.")] = Path(
        "steadynorm-report"
    ),
    as_json: Annotated[bool, _JSON] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Train the same network with and without batch norm, and measure what that does for it.

    Every arm gets the same search for its learning rate and initialisation; what is reported comes from fresh seeds. An
    interrupted comparison keeps what it has finished: the same command takes it up again.
    """
    from steadynorm.experiment import STUDIES
    from steadynorm.report import print_report, to_json

    chosen = STUDIES if studies is None else tuple(name.strip() for name in studies.split(",") if name.strip())
    comparison = sn.compare(
        data,
        model,
        label=label,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        steps=steps,
        batch_size=batch_size,
        target=_target(target),
        optimizer=cast(Literal["sgd", "adam"], optimizer),
        arms=None if arms is None else _arms(arms),
        studies=chosen,
        jobs=jobs,
        out=out,
        progress=not quiet,
    )
    if as_json:
        typer.echo(to_json(comparison.results))
    else:
        print_report(comparison.results, report=out / "report.html")
    if comparison.results["status"] == "interrupted":
        typer.echo(f"\nInterrupted. What has finished is in {out}; the same command goes on from there.", err=True)
        raise typer.Exit(130)


@app.command(
    epilog="Examples:  steadynorm shift train.parquet today.csv   |   "
    "steadynorm shift 'train/*.parquet' 'serving/*.parquet' --out shift.html   |   "
    "steadynorm shift photos/train photos/today   |   "
    "steadynorm shift train.csv today.csv --type zip=categorical --fail-on-shift --json"
)
def shift(
    reference: Annotated[
        str,
        typer.Argument(
            help="What the model was trained on: a path or glob of CSV, TSV, Parquet, JSON-lines or Arrow files, an "
            ".npy or .npz file, a folder of images, or URL::TABLE, a table that Ibis can name."
        ),
    ],
    current: Annotated[str, typer.Argument(help="What it meets now, any of the same.")],
    tolerance: Annotated[float, typer.Option(help="The effect that does not matter yet, in deviations.")] = 0.1,
    confidence: Annotated[float, typer.Option(help="That all intervals together hold.")] = 0.95,
    columns: Annotated[str | None, typer.Option(help="Compare these columns only, separated by commas.")] = None,
    types: Annotated[
        list[str] | None,
        typer.Option("--type", help="NAME=KIND: numeric, categorical, boolean, time or text. May be repeated."),
    ] = None,
    sample: Annotated[int, typer.Option(help="Rows a side for ranks, distances and the classifier.")] = 200_000,
    classifier_rows: Annotated[int, typer.Option(help="Rows a side for the domain classifier; 0: none.")] = 5_000,
    seed: Annotated[int, typer.Option(help="Of the sample, the classifier and its permutations.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the report to this HTML file.")] = None,
    fail_on_shift: Annotated[
        bool, typer.Option("--fail-on-shift", help="Exit with 1 if the verdict is shifted.")
    ] = False,
    as_json: Annotated[bool, _JSON] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Compare the data that a model was trained on with the data that it meets now.

    Each feature is judged by how large its shift is, with an interval, against a tolerance; a classifier looks at all
    of them together.
    """
    if out is not None and out.is_dir():
        raise ArgumentError(f"--out must name a file, got the folder {str(out)!r}.")
    report = sn.shift.compare(
        reference,
        current,
        tolerance=tolerance,
        confidence=confidence,
        types=_types(types or []),
        columns=None if columns is None else _names(columns),
        sample=sample,
        classifier_rows=classifier_rows,
        seed=seed,
        progress=not quiet and sys.stderr.isatty(),
    )
    if out is not None:
        report.write_html(out)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        from steadynorm.report.shift import print_shift

        print_shift(report.to_dict())
        if out is not None:
            typer.echo(f"Report: {out}")
    if fail_on_shift and report.verdict == "shifted":
        raise typer.Exit(1)


app.command(epilog=DIAGNOSE_EXAMPLES)(diagnose)
app.command(epilog=RECALIBRATE_EXAMPLES)(recalibrate)
app.command(epilog=FOLD_EXAMPLES)(fold)
app.command(epilog=CHECK_EXAMPLES)(check)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ArgumentError("--columns must name at least one column, got none. Leave it out to compare all.")
    return names


def _types(given: list[str]) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for text in given:
        name, sign, kind = text.rpartition("=")
        if not (name and sign and kind):
            raise ArgumentError(f"--type must be NAME=KIND, such as zip=categorical, got {text!r}.")
        types[name] = kind
    return types


def _arms(text: str) -> "tuple[Arm, ...]":
    from steadynorm.experiment.arms import DEFAULT_ARMS

    wanted, known = {name.strip() for name in text.split(",")}, {arm.id: arm for arm in DEFAULT_ARMS}
    if not (wanted <= known.keys() and "plain" in wanted and len(wanted) > 1):
        raise ArgumentError(f"--arms must be plain and at least one other of {', '.join(known)}, got {text!r}.")
    return tuple(arm for arm in DEFAULT_ARMS if arm.id in wanted)


def _target(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(f"--target must be auto or an accuracy between 0 and 1, got {text!r}.") from None


def main() -> None:
    """Runs the command line; every error of the package's own, or of the system's, becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # redirected output may be in an encoding that lacks a sign
            stream.reconfigure(errors="replace")
    try:
        app()
        sys.stdout.flush()
    except SteadynormError as error:
        typer.echo(f"steadynorm: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe (head, less) has left
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # a full disk, a name that is too long
        typer.echo(f"steadynorm: {error.strerror or error}: {error.filename or 'the output'}.", err=True)
        sys.exit(2)
