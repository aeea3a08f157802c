"""A trained network on disk: its weights in `model.safetensors`, and what rebuilds it in `model.json`."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from steadynorm.errors import ModelError
from steadynorm.experiment import arms, models
from steadynorm.files import user_code
from steadynorm.files.aside import write_aside

__all__ = ["load_model", "read_spec", "save_model"]

WEIGHTS_FILE: Final = "model.safetensors"
SPEC_FILE: Final = "model.json"
_SCHEMA: Final = 1

_REQUIRED: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "model": ("a model's name or pkg.mod:factory", lambda v: isinstance(v, str)),
    "arm": ("an arm's id", lambda v: isinstance(v, str)),
    "where": ("null, before, after, own or first", lambda v: v in (None, "before", "after", "own", "first")),
    "input_shape": ("a list of positive whole numbers", lambda v: _is_list(v, int) and v and all(n > 0 for n in v)),
    "classes": ("a list of at least two names", lambda v: _is_list(v, str) and len(v) >= 2),
}


def save_model(folder: str | os.PathLike[str], model: nn.Module, spec: Mapping[str, Any]) -> Path:
    """Writes a network so that `load_model` gives it back; an older one in the folder is replaced.

    Both files are written aside and renamed. `model.json` holds the digest of the weights that belong to it, so that
    a mixture of two saves, or a truncated copy, is noticed on loading.

    Args:
        folder: Made if it is not there.
        model: The network. Its parameters and buffers are saved, from whatever device they are on.
        spec: What rebuilds it: `model` (a name that `models.resolve` knows, or "pkg.mod:factory"), `arm` (the id),
            `where` (the arm's, or None), `input_shape` (of one example), `classes` (names), and optionally `dropout`.
            Whatever else is in it (such as `preprocessing`, the mean and scale of a table's features) is kept as well.
            Plain JSON values only.

    Returns:
        The path of `model.safetensors`.

    Raises:
        ModelError: The spec lacks something, the state is not all tensors, or the folder cannot be written to.
    """
    from safetensors.torch import save

    where = Path(folder)
    _check_spec(str(where), {**spec})
    state = cast("dict[str, object]", model.state_dict())
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ModelError(f"only tensors can be saved, but {odd[0]!r} in the model's state is none. Make it a buffer.")
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    tensors = {name: cast("Tensor", value).detach().cpu().contiguous().clone() for name, value in state.items()}
    weights = save(tensors)
    versions = {"steadynorm": version("steadynorm"), "torch": torch.__version__, "python": platform.python_version()}
    record = {**spec, "format": "steadynorm model", "schema": _SCHEMA, "versions": versions,
              "sha256": hashlib.sha256(weights).hexdigest()}  # fmt: skip
    try:
        text = json.dumps(record, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the model's spec must hold plain JSON values: {error}.") from error
    try:
        where.mkdir(parents=True, exist_ok=True)
        write_aside({where / WEIGHTS_FILE: weights, where / SPEC_FILE: text.encode()})
    except OSError as error:
        raise ModelError(f"cannot write the model into {where}: {error}. Choose another folder.") from error
    return where / WEIGHTS_FILE


def load_model(
    folder: str | os.PathLike[str], factory: "str | nn.Module | Callable[..., nn.Module] | None" = None
) -> nn.Module:
    """Rebuilds a saved network and loads its weights.

    The file never decides which code is imported: a model of the user's own is built by the `factory` passed here.

    Args:
        folder: Where `save_model` wrote it.
        factory: For a model that is not one of this package's: what was given to `compare` as the model, as
            "pkg.mod:factory", the function, or the module.

    Returns:
        The network on the CPU in evaluation mode. It expects what the training saw: examples scaled as by `load`, and
        for a table `(x - mean) * scale` with the `preprocessing` of `read_spec`.

    Raises:
        ModelError: A file is missing, damaged or from another program; the factory is missing or builds another
            network than the one saved.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    where = Path(folder)
    spec = read_spec(where)
    weights = _read(where / WEIGHTS_FILE)
    if hashlib.sha256(weights).hexdigest() != spec["sha256"]:
        raise ModelError(
            f"{where / WEIGHTS_FILE} is not the file that {SPEC_FILE} describes: it is damaged, incomplete or from "
            "another save. Copy both files again, or save the model again."
        )
    try:
        state = load(weights)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{where / WEIGHTS_FILE} is no safetensors file: {error}. Save the model again.") from error
    model = _rebuild(where, spec, factory)
    expected = model.state_dict()
    wrong = [name for name in expected if name in state and state[name].dtype != expected[name].dtype]
    try:
        if wrong:
            raise RuntimeError(f"{wrong[0]} is {state[wrong[0]].dtype}, not {expected[wrong[0]].dtype}")
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{where}: the weights do not fit the network that {spec['model']} builds: {reason}. "
            "Pass the factory, unchanged, that the model was trained with."
        ) from error
    return model.eval()


def read_spec(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `model.json` says about a saved network: the `spec` of `save_model`, `versions`, and the weights' digest.

    Raises:
        ModelError: The file is missing, is not JSON, or was not written by `save_model`.
    """
    path = Path(folder) / SPEC_FILE
    try:
        found: object = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}. Copy the file again, or save the model again.") from error
    spec = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if spec.get("format") != "steadynorm model" or not isinstance(spec.get("sha256"), str):
        raise ModelError(f"{path} does not describe a saved model. Point at a folder that `compare` saved one into.")
    if spec.get("schema") != _SCHEMA:
        raise ModelError(
            f"{path} has schema {spec.get('schema')!r}, this version reads {_SCHEMA}. Use the steadynorm that wrote it."
        )
    _check_spec(str(path), spec)
    return spec


def _check_spec(where: str, spec: dict[str, Any]) -> None:
    for key, (what, holds) in _REQUIRED.items():
        if key not in spec or not holds(spec[key]):
            raise ModelError(f"{where}: {key!r} must be {what}, got {spec.get(key, 'nothing')!r}.")
    dropout = spec.get("dropout", 0.0)
    if not (isinstance(dropout, int | float) and 0 <= dropout < 1):
        raise ModelError(f"{where}: 'dropout' must be a number in [0, 1), got {dropout!r}.")


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(type(each) is kind for each in cast("list[object]", value))


def _rebuild(
    where: Path, spec: dict[str, Any], factory: "str | nn.Module | Callable[..., nn.Module] | None"
) -> nn.Module:
    name: str = spec["model"]
    if factory is None and name not in models.NAMES:
        raise ModelError(
            f"{where}: this model is built by {name!r}, which is not part of steadynorm, and no file decides what "
            f"code is run here. Pass it as factory= (factory={name!r}, or the function itself) if you trust it."
        )
    if isinstance(factory, str) and user_code.is_name(factory):
        factory = user_code.import_named(factory, ModelError)
    source = models.resolve(name if factory is None else factory)
    arm = arms.Arm(spec["arm"], spec["arm"], spec["where"])
    shape, classes, dropout = tuple(spec["input_shape"]), len(spec["classes"]), float(spec.get("dropout", 0.0))
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away: leave the caller's stream alone
        return user_code.call(
            lambda: arms.build(source, arm, shape, classes, dropout=dropout),
            name=f"the model factory {source.name!r}",
            error=ModelError,
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror or error}. A saved model is a folder with {WEIGHTS_FILE} and "
            f"{SPEC_FILE}; point at that folder."
        ) from error
