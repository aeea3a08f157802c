"""The command `steadynorm diagnose`: a checkpoint by itself, or a model with its weights and data."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from steadynorm.commands.networks import built
from steadynorm.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from steadynorm.population.findings import Diagnosis

__all__ = ["EXAMPLES", "diagnose"]

EXAMPLES = (
    "Examples:  steadynorm diagnose model.safetensors   |   steadynorm diagnose last.pt --html diagnosis.html   |   "
    "steadynorm diagnose model.onnx --json --fail-on warning   |   "
    "steadynorm diagnose mypkg.nets:build --weights model.pt --data mypkg.data:loader"
)


def diagnose(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|FACTORY",
            help="A .safetensors, .pt or .onnx file, read without the model's code; or pkg.mod:factory, which returns "
            "the model.",
        ),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="Load this .safetensors or .pt file into the factory's model.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Measure the gap between training and evaluation on this: pkg.mod:factory of a loader of (inputs, "
            "targets), or what `steadynorm compare --data` reads (in random order, without its fixed test set)."
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Training data, where --data is of other data; any of the same.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="The table's label column.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a batch, where --data is no loader.", min=2)] = 64,
    examples: Annotated[int, typer.Option(help="Read at most so many examples.", min=2)] = 4096,
    html: Annotated[Path | None, typer.Option(help="Write the findings to this HTML file.")] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="error or warning: exit with 1 if there is such a finding, or a worse one.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON; nothing else goes to standard output.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Find out what is wrong with the batch norms of a model: findings, their figures, and what to do.

    A checkpoint is read without the model's code and never executed. With a factory and data, the gap between training
    and evaluation is measured and attributed.
    """
    if fail_on not in (None, "error", "warning"):
        raise ArgumentError(f"--fail-on must be error or warning, got {fail_on!r}.")
    found = _found(subject, weights, data, reference, label, batch_size, examples, not quiet and sys.stderr.isatty())
    if html is not None:
        found.to_html(html)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        from steadynorm.report.diagnosis import print_diagnosis

        print_diagnosis(found.to_dict())
        if html is not None:
            typer.echo(f"Report: {html}")
    if fail_on is not None and found.at_least(fail_on):
        raise typer.Exit(1)


def _found(
    subject: str,
    weights: Path | None,
    data: str | None,
    reference: str | None,
    label: str | None,
    batch_size: int,
    examples: int,
    progress: bool,
) -> "Diagnosis":
    import steadynorm as sn
    from steadynorm.files import user_code
    from steadynorm.population.checkpoint import diagnose_checkpoint

    if Path(subject).exists() or not user_code.is_name(subject):
        if weights is not None or data is not None or reference is not None:
            raise ArgumentError(
                "--weights, --data and --reference need the model's code: give pkg.mod:factory in place of the "
                "checkpoint, and the checkpoint as --weights."
            )
        return diagnose_checkpoint(subject)
    if reference is not None and data is None:
        raise ArgumentError("--reference is compared with --data: give both.")
    model = built(subject, weights)
    loader = None if data is None else _batches(data, label, batch_size)
    other = None if reference is None else _batches(reference, label, batch_size)
    return sn.diagnose(model, loader, reference=other, examples=examples, progress=progress)


def _batches(source: str, label: str | None, batch_size: int) -> Iterable[Any]:
    from collections.abc import Mapping

    import torch
    from torch.utils.data import Dataset

    from steadynorm.experiment.data import load
    from steadynorm.files import user_code

    given: Any = source
    if user_code.is_name(source) and not Path(source).exists():
        given = user_code.call(user_code.import_named(source, DataError), name=source, error=DataError)
        if isinstance(given, Iterable) and not isinstance(given, (tuple, Mapping, Dataset)):
            return cast("Iterable[Any]", given)
    read = load(given, label=label)
    order = torch.randperm(len(read.x), generator=torch.Generator().manual_seed(0))
    x, y = read.x[order], read.y[order]
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))
