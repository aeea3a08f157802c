"""A network that the command line names, with the weights of a file; nothing in the file is executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from steadynorm.errors import ModelError
from steadynorm.files.aside import write_aside
from steadynorm.files.weights import read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["built", "write_weights"]

_INSIDE: Final = ("state_dict", "model_state_dict", "model")


def built(name: str, weights: Path | None) -> "nn.Module":
    """The factory's network, with the file's weights if one is given."""
    from torch import nn

    from steadynorm.files import user_code

    network: object = user_code.call(user_code.import_named(name, ModelError), name=repr(name), error=ModelError)
    if not isinstance(network, nn.Module):
        raise ModelError(f"{name!r} must build a torch.nn.Module, got a {type(network).__name__}.")
    if weights is None:
        return network
    state = _state(weights)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{weights}: the weights do not fit the network that {name!r} builds: {reason}.") from error
    return network


def _state(path: Path) -> dict[str, "Tensor"]:
    """The tensors of a state_dict, less what AveragedModel or DataParallel put before their names."""
    found: Any = read_weights(path, ModelError)
    for inside in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(inside), Mapping):
            found = cast("Mapping[str, Any]", found[inside])
    from torch import Tensor

    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ModelError(f"{path} must hold a state_dict, tensors by name. Save model.state_dict() alone.")
    state = {str(key): tensor for key, tensor in found.items() if key != "n_averaged"}
    wrapped = bool(state) and all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if wrapped else key: tensor for key, tensor in state.items()}


def write_weights(out: Path, network: "nn.Module") -> None:
    """Writes a state_dict as .safetensors.

    Raises:
        ModelError: It cannot be written.
    """
    from safetensors.torch import save

    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    content = save({name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()})
    try:
        write_aside({out: content})
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error.strerror or error}. Choose another folder.") from error
