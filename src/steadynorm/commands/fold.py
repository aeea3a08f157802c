"""`steadynorm fold`: a network without its batch norms, as weights or as a program for other runtimes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer

from steadynorm.commands.arrays import example_of
from steadynorm.commands.networks import built, write_weights
from steadynorm.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from steadynorm.surgery.folding import FoldedModel

__all__ = ["EXAMPLES", "fold"]

EXAMPLES: Final = (
    "Examples:  steadynorm fold mypkg.nets:build --weights last.pt --out folded.safetensors   |   steadynorm fold "
    "mypkg.nets:build --weights last.safetensors --example 8x3x224x224 --out model.onnx   |   steadynorm fold "
    "mypkg.nets:build --weights last.pt --example batch.npy --out model.pt2 --no-fold --json"
)

_KINDS: Final = (".safetensors", ".pt2", ".onnx")


def fold(
    model: Annotated[str, typer.Argument(help="pkg.mod:factory, which builds the network without arguments.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Where to: .safetensors (the folded network's weights), .pt2 (a program of torch.export) or .onnx."
        ),
    ],
    weights: Annotated[
        Path | None, typer.Option(help="Its state_dict: a .safetensors file, or one of torch.save.")
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(
            help="An input: a shape such as 8x3x224x224, or an .npy, .npz or .safetensors file (several arrays are "
            "arguments by name). The result is checked on it; .pt2 and .onnx need it."
        ),
    ] = None,
    fold_: Annotated[bool, typer.Option("--fold/--no-fold", help="Write the network folded, or as it is.")] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check the result against the network, on the example.")
    ] = True,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="Export for the example's number of examples, not for any.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, for machines; nothing else goes to stdout.")
    ] = False,
) -> None:
    """Fold a network's batch norms into the layers around them, for inference, and write what is left.

    In evaluation a batch norm is an affine map, which a neighbour's weights can take over. Files are never unpickled.
    """
    from steadynorm.files import user_code
    from steadynorm.surgery import folding
    from steadynorm.surgery.exporting import export

    if out.suffix not in _KINDS:
        raise ArgumentError(f"--out must be a {', '.join(_KINDS[:-1])} or {_KINDS[-1]} file, got {str(out)!r}.")
    if not out.absolute().parent.is_dir():
        raise ArgumentError(f"the folder of --out {str(out)!r} does not exist. Make it first.")
    if example is None and out.suffix != ".safetensors":
        raise ArgumentError(f"{out.suffix} needs --example, an input of the network: a shape such as 8x3x224x224.")
    network = built(model, weights).eval()
    given = None if example is None else example_of(example, network)
    name = f"the network of {model!r}"
    report: dict[str, Any] = {}
    said: list[str] = []

    def made() -> "nn.Module":
        folded = folding.fold(network, example=given, verify=given if verify else None)
        found = cast("FoldedModel", folded).fold_report
        report["fold"] = found.to_dict()
        said.append(str(found))
        return folded

    result = user_code.call(made, name=name, error=ModelError) if fold_ else network
    if out.suffix == ".safetensors":
        write_weights(out, result)
        report["file"] = {"path": str(out), "bytes": out.stat().st_size}
        said.append(f"{out}: {out.stat().st_size / 1e6:.3g} MB")
    else:
        exported = user_code.call(
            lambda: export(result, given, out, fixed_batch=fixed_batch, verify=verify), name=name, error=ModelError
        )
        report["file"] = exported.to_dict()
        said.append(str(exported))
    typer.echo(json.dumps(report, indent=2, allow_nan=False) if as_json else "\n".join(said))
