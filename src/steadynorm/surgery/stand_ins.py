"""Layers of ours that take the place of batch norms which `BatchNorm1d`, `2d` and `3d` could not be."""

from typing import Any

from torch import Tensor

from steadynorm.errors import ShapeError
from steadynorm.nn.base import BatchNorm
from steadynorm.nn.batchnorm import BatchNorm2d

__all__ = ["FrozenBatchNorm2d", "SyncedBatchNorm"]


class SyncedBatchNorm(BatchNorm):
    """In the place of `torch.nn.SyncBatchNorm`, which does not say how many axes its input has: (N, C) or (N, C, *).

    Formula, arguments and behaviour as in `BatchNorm1d`, with a `process_group`.

    Example:
        >>> import torch
        >>> layer = SyncedBatchNorm(3, process_group="world")
        >>> layer(torch.randn(4, 3)).shape, layer(torch.randn(4, 3, 5, 5)).shape
        (torch.Size([4, 3]), torch.Size([4, 3, 5, 5]))
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ShapeError(f"{self} expected input (N, C) or (N, C, *), got shape {tuple(input.shape)}.")


class FrozenBatchNorm2d(BatchNorm2d):
    """In the place of torchvision's layer of that name: γ and β are buffers, and nothing counts the batches.

    So the state_dict keeps its four entries, the model keeps the parameters it had, and checkpoints of layers that were
    not frozen, with their count, load as they did.

    Example:
        >>> FrozenBatchNorm2d(3)
        FrozenBatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if self._buffers.get("num_batches_tracked") is None:
            state_dict.pop(prefix + "num_batches_tracked", None)
            local_metadata = {**local_metadata, "version": 2}  # torch would add a count to what is older
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
