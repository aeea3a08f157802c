"""What the three layers share: when which statistics normalise, what is committed, and how the buffers stay wide."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]

from steadynorm.activations import ActivationLike, resolve
from steadynorm.errors import ArgumentError, RejectedBatchWarning, ShapeError
from steadynorm.functional import require_several_values, run, warn_if
from steadynorm.nn.tracing import is_proxy, leaf_call
from steadynorm.ops.commit import commit
from steadynorm.ops.layout import Layout

__all__ = ["BatchNorm", "SingleValue"]

SingleValue = Literal["error", "running", "beta"]
_NARROW = (torch.float16, torch.bfloat16)


class BatchNorm(TorchBatchNorm):
    """The common body of `BatchNorm1d`, `2d` and `3d`; not used by itself."""

    _dims: tuple[int, ...] = ()
    _shape = ""
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _rejected: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
        channel_dim: int = 1,
        single_value: SingleValue = "error",
    ) -> None:
        if single_value not in get_args(SingleValue):
            raise ArgumentError(f"single_value must be one of {get_args(SingleValue)}, got {single_value!r}.")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ArgumentError(f"momentum must lie in [0, 1], the share of the new batch, or be None; got {momentum}.")
        if single_value == "running" and not track_running_stats:
            raise ArgumentError(
                'single_value="running" needs track_running_stats=True: there is nothing to fall back on.'
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.activation = resolve(activation)
        self.channel_dim = channel_dim
        self.single_value: SingleValue = single_value
        self._rejected_seen = 0
        # Not in the state_dict, which stays torch.nn's; a buffer, so that it lives on the layer's device.
        counter = torch.zeros((), dtype=torch.long, device=device) if track_running_stats else None
        self.register_buffer("_rejected", counter, persistent=False)
        self._widen_buffers({})

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Normalises `input`; in training mode also commits its statistics. See the class for the arguments."""
        if is_proxy(input):
            return leaf_call(self, input, residual=residual, mask=mask, sample_weight=sample_weight)
        self._check_input_dim(input)
        layout = Layout.of(input, self.channel_dim)
        if layout.channels != self.num_features:
            raise ShapeError(
                f"{self} expected {self.num_features} channels in dimension {self.channel_dim}, got {layout.channels}: "
                f"an input of shape {tuple(input.shape)}."
            )
        tracks = self.running_mean is not None and self.running_var is not None
        by_batch = self.training or not tracks
        if by_batch and layout.count == 1:
            if self.single_value == "error":
                with_statistics = 'switch to evaluation with model.eval(), or choose single_value="running" or "beta"'
                ways_out = with_statistics if tracks else 'choose single_value="beta", or track_running_stats=True'
                require_several_values(input, layout, str(self), ways_out)
            by_batch = self.single_value == "beta"
        y, statistics = run(
            input, self.running_mean, self.running_var, self.weight, self.bias, by_batch, self.eps,
            activation=self.activation, residual=residual, mask=mask, sample_weight=sample_weight,
            layout=layout,
        )  # fmt: skip
        if self.training and statistics is not None and self.running_mean is not None and self.running_var is not None:
            refused = commit(
                self.running_mean, self.running_var, statistics, self.momentum, self.num_batches_tracked,
                self._rejected, weighted=sample_weight is not None,
            )  # fmt: skip
            if refused is True:
                self._rejected_seen += 1
                warn_if(refused, self)
        return y

    @property
    def rejected_batches(self) -> int:
        """How many batches were kept out of the running statistics because theirs were not finite (or did not fit).

        Counted on the layer's device; reading it waits for the device, and warns if there are new ones since the last
        time it was read. On the CPU in eager mode the warning comes at once, from the forward. Under
        DistributedDataParallel, which sends rank 0's buffers to all, the count is rank 0's.
        """
        counter = self._rejected
        found = 0 if counter is None else int(counter)
        if found > self._rejected_seen:
            warnings.warn(
                f"{self}: {found - self._rejected_seen} batches with non-finite statistics were not committed.",
                RejectedBatchWarning,
                stacklevel=2,
            )
        self._rejected_seen = found
        return found

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._dims:
            wanted = " or ".join(f"{d}-D" for d in self._dims)
            raise ShapeError(f"{self} expected {wanted} input {self._shape}, got shape {tuple(input.shape)}.")

    def reset_running_stats(self) -> None:
        """Back to mean 0 and variance 1, nothing counted."""
        super().reset_running_stats()
        self._reset_rejected()

    def _reset_rejected(self) -> None:
        counter, beside = self._buffers.get("_rejected"), self.running_mean
        if counter is not None and beside is not None:
            self._buffers["_rejected"] = torch.zeros_like(counter, device=beside.device)
            self._rejected_seen = 0

    def _widen_buffers(self, before: dict[str, Tensor | None]) -> None:
        """Keeps the running statistics in float32 at least: in half precision they stall or overflow."""
        for name in ("running_mean", "running_var"):
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype in _NARROW:
                source = before.get(name)
                source = buffer if source is None or source.is_meta else source
                self._buffers[name] = source.to(device=buffer.device, dtype=torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchNorm":
        before = {name: self._buffers.get(name) for name in ("running_mean", "running_var")}
        counted_on_meta = self._rejected is not None and self._rejected.is_meta
        super()._apply(fn, recurse)
        self._widen_buffers(before)
        if counted_on_meta:
            self._reset_rejected()  # to_empty() leaves arbitrary memory, which no state_dict fills
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen_buffers({})  # load_state_dict(assign=True) brings its own dtype
        counter, beside = self._rejected, self.running_mean
        if counter is not None and counter.is_meta and beside is not None and not beside.is_meta:
            self._reset_rejected()  # and its own device, to a layer built on "meta"

    def extra_repr(self) -> str:
        """torch.nn's, and what differs from the defaults of the options that torch.nn lacks."""
        options = [super().extra_repr()]
        if self.activation is not None:
            options.append(f"activation={self.activation}")
        if self.channel_dim != 1:
            options.append(f"channel_dim={self.channel_dim}")
        if self.single_value != "error":
            options.append(f"single_value={self.single_value!r}")
        return ", ".join(options)
