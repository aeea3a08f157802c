"""`steadynorm recalibrate`: weights in a file, recalibrated on data in a file, into another file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from steadynorm.commands.arrays import arrays_in, one_of
from steadynorm.commands.networks import built, write_weights
from steadynorm.errors import ArgumentError, DataError, ModelError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["EXAMPLES", "recalibrate"]

EXAMPLES: Final = (
    "Examples:  steadynorm recalibrate mypkg.nets:build --weights swa.pt --data train.npy --out swa.safetensors   |   "
    "steadynorm recalibrate mypkg.nets:build --weights model.safetensors --data mypkg.data:loader --order sequential "
    "--out model.safetensors --json"
)


def recalibrate(
    model: Annotated[str, typer.Argument(help="pkg.mod:factory, which builds the network without arguments.")],
    weights: Annotated[Path, typer.Option(help="Its state_dict: a .safetensors file, or one of torch.save.")],
    data: Annotated[
        str,
        typer.Option(
            help="What it is measured on: an .npy, .npz (x, or the only array) or .safetensors file of inputs "
            "(N, ...), or pkg.mod:factory, which gives a loader."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the weights go, with their new statistics: a .safetensors file.")],
    order: Annotated[str, typer.Option(help="joint: one pass; sequential: exact, one pass for each layer.")] = "joint",
    batch_size: Annotated[int, typer.Option(help="Examples in a batch, of data from a file.", min=1)] = 256,
    batches: Annotated[int | None, typer.Option(help="Use so many batches only.", min=1)] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for machines; nothing else goes to stdout.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure the running statistics of a network's batch norms anew, on data, under the weights as they are.

    For weights that were averaged (EMA, SWA), pruned or trained with micro-batches. Files are never unpickled.
    """
    from steadynorm.files import user_code
    from steadynorm.population.recalibration import recalibrate_

    if out.suffix != ".safetensors":
        raise ArgumentError(f"--out must be a .safetensors file, got {str(out)!r}.")
    if not out.absolute().parent.is_dir():
        raise ArgumentError(f"the folder of --out {str(out)!r} does not exist. Make it first.")
    if order not in ("joint", "sequential"):
        raise ArgumentError(f"--order must be joint or sequential, got {order!r}.")
    network = built(model, weights)
    loader = _loader(data, network, batch_size)
    try:
        report = user_code.call(
            lambda: recalibrate_(network, loader, batches=batches, progress=not quiet, order=order),
            name=f"the network of {model!r} on {data!r}",
            error=ModelError,
        )
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted: nothing was written to {out}.", err=True)
        raise typer.Exit(130) from None
    write_weights(out, network)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        typer.echo(f"{report}\nWeights: {out}")


def _loader(data: str, network: "nn.Module", batch_size: int) -> Iterable[Any]:
    from torch import Tensor

    from steadynorm.files import user_code

    path = Path(data)
    if user_code.is_name(data) and not path.exists():
        given: Any = user_code.call(user_code.import_named(data, DataError), name=repr(data), error=DataError)
    else:
        if path.suffix.lower() not in (".npy", ".npz", ".safetensors"):
            raise DataError(
                f"--data must be an .npy, .npz or .safetensors file, or pkg.mod:factory for anything else; got {path}."
            )
        given = one_of(arrays_in(path), path)
    if not isinstance(given, Tensor):
        return given
    if given.dim() == 0:
        raise DataError(f"{data} must hold inputs (N, ...), got a single number.")
    kind = next((p.dtype for p in network.parameters() if p.is_floating_point()), None)
    return (given.to(kind) if kind is not None and given.is_floating_point() else given).split(batch_size)
