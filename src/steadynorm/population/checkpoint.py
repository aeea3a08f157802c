"""Reads the batch norms out of a checkpoint without the model's code: .safetensors, .pt (tensors alone) and .onnx."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor

from steadynorm.errors import MissingDependencyError, ModelError
from steadynorm.files.weights import read_weights
from steadynorm.population.findings import Diagnosis
from steadynorm.population.states import LayerState
from steadynorm.population.weights import from_weights

__all__ = ["diagnose_checkpoint", "read_states", "read_tensors"]

_DEPTH: Final = 4
_WRAPPERS: Final = ("module.", "_orig_mod.")


def diagnose_checkpoint(path: str | os.PathLike[str]) -> Diagnosis:
    """What the stored statistics in a file say by themselves; the model's code is not needed, and nothing is executed.

    Args:
        path: A .safetensors file, one that `torch.save` wrote (read with `weights_only=True`), or an .onnx file (needs
            the extra `onnx`).

    Returns:
        The findings from weights alone.

    Raises:
        ModelError: The file is missing, damaged, of another format, holds more than tensors, or has no batch norm.
        MissingDependencyError: An .onnx file, and onnx is not installed.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(nn.BatchNorm1d(3).state_dict(), Path(folder, "new.pt"))
        ...     diagnose_checkpoint(Path(folder, "new.pt")).findings[0].kind
        'never updated'
    """
    states = read_states(path)
    return Diagnosis.ranked(Path(path).name, len(states), from_weights(states))


def read_states(path: str | os.PathLike[str]) -> list[LayerState]:
    """The batch norms in a file, in its order, recognised by `running_mean` and `running_var` (nodes in .onnx)."""
    where = Path(path)
    found = list(_onnx_states(where) if where.suffix.lower() == ".onnx" else _states(read_tensors(where)))
    if not found:
        raise ModelError(
            f"{where} holds no batch norm: no running_mean and running_var of one size"
            + (", no BatchNormalization node (exporters fold them into convolutions)." if where.suffix == ".onnx"
               else " under one name.")
        )  # fmt: skip
    return found


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or of one that `torch.save` wrote, on the CPU, by name.

    Nested dictionaries are flattened; a nesting that all names share (such as 'state_dict') and wrappers' prefixes
    ('module.', '_orig_mod.') are left out.

    Raises:
        ModelError: The file cannot be read as asked, or would run code on loading.
    """
    where = Path(path)
    try:
        with where.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"cannot read {where}: {error.strerror or error}. Give a checkpoint file.") from error
    if where.suffix.lower() == ".safetensors":
        return _stripped(read_weights(where, ModelError))
    if magic[:2] == b"PK" or magic[:1] == b"\x80":
        return _stripped(dict(_flat(read_weights(where, ModelError), "", _DEPTH)))
    raise ModelError(
        f"{where} is no checkpoint that can be read: .safetensors, .onnx, or a file written by torch.save is required."
    )


def _flat(value: object, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value.detach()
    elif isinstance(value, Mapping) and depth:
        for key, inner in cast("Mapping[Any, object]", value).items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key), depth - 1)


def _stripped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the containers that all batch norms lie in; other tensors beside them (an optimizer's) are dropped."""
    norms = [name for name in tensors if name.endswith("running_var")]
    changed = bool(norms)
    while changed:
        changed = False
        heads = {name.partition(".")[0] for name in norms}
        head = f"{next(iter(heads))}."
        container = head[:-1] in ("state_dict", "model_state_dict", "model", "net", "network", "weights", "ema")
        if len(heads) == 1 and (container or head in _WRAPPERS) and all(name.startswith(head) for name in norms):
            tensors = {name.removeprefix(head): t for name, t in tensors.items() if name.startswith(head)}
            norms = [name.removeprefix(head) for name in norms]
            changed = bool(norms)
    return tensors


def _states(tensors: Mapping[str, Tensor]) -> Iterator[LayerState]:
    for key, var in tensors.items():
        prefix, dot, last = key.rpartition(".")
        mean = tensors.get(f"{prefix}{dot}running_mean")
        if last != "running_var" or mean is None or mean.shape != var.shape or var.dim() != 1 or not var.numel():
            continue
        mean, var = (_numbers(t, f"{prefix}{dot}{of}") for t, of in ((mean, "running_mean"), (var, "running_var")))
        gamma, beta = (tensors.get(f"{prefix}{dot}{name}") for name in ("weight", "bias"))
        tracked = tensors.get(f"{prefix}{dot}num_batches_tracked")
        if tracked is not None and not bool(torch.isfinite(_numbers(tracked.double(), key)).all()):
            tracked = None
        yield LayerState(
            prefix,
            mean,
            var,
            gamma.double() if gamma is not None and gamma.shape == var.shape else None,
            beta.double() if beta is not None and beta.shape == var.shape else None,
            int(tracked) if tracked is not None and tracked.numel() == 1 else None,
        )


def _numbers(t: Tensor, name: str) -> Tensor:
    """Statistics that can be computed with; those of a single byte (float8) in float32."""
    if t.layout != torch.strided or t.is_meta or not t.is_floating_point():
        raise ModelError(f"{name} holds no dense real numbers but {t.layout} of {t.dtype}. Save it as float32.")
    return t.float() if t.itemsize == 1 else t


def _onnx_states(where: Path) -> Iterator[LayerState]:
    try:
        import onnx  # pyright: ignore
        from onnx import numpy_helper  # pyright: ignore
    except ImportError as error:
        raise MissingDependencyError(
            "reading .onnx files needs onnx, which is not installed: pip install 'steadynorm[onnx]'."
        ) from error
    library, helper = cast("Any", onnx), cast("Any", numpy_helper)
    try:
        graph = library.load(str(where)).graph
        constants = {t.name: t for t in graph.initializer}
        constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute}
        nodes = [n for n in graph.node if n.op_type == "BatchNormalization"]
        arrays = [
            [torch.from_numpy(helper.to_array(constants[name]).copy()) for name in n.input[1:5] if name in constants]
            for n in nodes
        ]
        settings = [{a.name: a.f for a in n.attribute} for n in nodes]
    except OSError as error:
        raise ModelError(f"cannot read {where}: {error.strerror or error}. Give a checkpoint file.") from error
    except Exception as error:  # protobuf's and onnx's own errors
        raise ModelError(f"{where} is damaged or no ONNX file ({_line(error)}). Export it again.") from error
    for node, found, options in zip(nodes, arrays, settings, strict=True):
        if len(found) == 4 and len({t.shape for t in found}) == 1:
            gamma, beta, mean, var = found
            name = node.name or node.input[4].removesuffix(".running_var") or node.output[0]
            eps = float(options.get("epsilon", 1e-5))
            kept = float(options.get("momentum", 0.9))  # here the share of the old statistics
            yield LayerState(name, mean, var, gamma.double(), beta.double(), None, eps, 1 - kept, True)


def _line(error: Exception) -> str:
    """The first line of an error's message, shortened."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}..."
