"""`steadynorm check`: torch's batch norms and ours on one's own network, side by side."""

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from steadynorm.commands.arrays import example_of
from steadynorm.commands.networks import built
from steadynorm.errors import ModelError

__all__ = ["EXAMPLES", "check"]

EXAMPLES: Final = (
    "Examples:  steadynorm check mypkg.nets:build --example 32x3x64x64   |   steadynorm check mypkg.nets:build "
    "--weights last.pt --example batch.npz --json   |   steadynorm check mypkg.nets:build --example 64x20 "
    "--fail-on-unsafe"
)


def check(
    model: Annotated[str, typer.Argument(help="pkg.mod:factory, which builds the network without arguments.")],
    weights: Annotated[
        Path | None, typer.Option(help="Its state_dict: a .safetensors file, or one of torch.save.")
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            help="An input of several examples: a shape such as 32x3x64x64, or an .npy, .npz or .safetensors file "
            "(several arrays are arguments by name). Without one nothing is run, and only what would be converted, "
            "fused and folded is said."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="What the timing of training steps may take.", min=0.01)] = 5.0,
    fail_on_unsafe: Annotated[
        bool, typer.Option("--fail-on-unsafe", help="Exit with 1 if something stands in the way.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for machines; nothing else goes to stdout.")
    ] = False,
) -> None:
    """Find out whether to switch: torch's batch norms and ours side by side on your own network.

    Error of each against float64, time of a training step, memory kept for backward, what converts, and the verdict.
    Files are never unpickled.
    """
    from steadynorm.files import user_code
    from steadynorm.surgery.checking import check as checked

    network = built(model, weights)
    given = None if example is None else example_of(example, network)
    try:
        report = user_code.call(
            lambda: checked(network, given, seconds=seconds), name=f"the network of {model!r}", error=ModelError
        )
    except KeyboardInterrupt:
        typer.echo("\nInterrupted.", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        from steadynorm.report.checking import print_check

        print_check(report.to_dict())
    if fail_on_unsafe and not report.safe:
        raise typer.Exit(1)
