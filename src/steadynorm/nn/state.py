"""What a layer remembers: its running statistics, of each domain, how they are written, and how they stay wide."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import ArgumentError, RejectedBatchWarning
from steadynorm.nn import domains as per_domain
from steadynorm.nn.domains import PARAMETERS, STATISTICS, named
from steadynorm.nn.remembering import Remember, commit_now
from steadynorm.nn.staleness import Staleness
from steadynorm.ops.commit import Running
from steadynorm.step import warn_if

__all__ = ["Stateful"]

_NARROW = (torch.float16, torch.bfloat16)
Entry = TypeVar("Entry")


def _without(entries: tuple[Entry, ...], one: Entry) -> tuple[Entry, ...]:
    """The entries less the last of those that are this very one."""
    at = next(i for i in reversed(range(len(entries))) if entries[i] is one)
    return entries[:at] + entries[at + 1 :]


class Stateful(TorchBatchNorm):
    """The buffers of the layers, and their life: committed to, cast, moved, copied, saved and loaded."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    _rejected: Tensor | None
    domains: tuple[str, ...]
    domain_affine: bool
    # What contexts set: the last one entered counts, and its own entry is what each takes out again. A copy has none.
    remember: Remember = staticmethod(commit_now)
    active_domain: str | None = None
    entered: tuple[Remember, ...] = ()
    domains_entered: tuple[str, ...] = ()
    frozen: bool = False

    def _init_state(self, domains: tuple[str, ...], domain_affine: bool, device: torch.device | str | None) -> None:
        self.domains = domains
        self.domain_affine = domain_affine
        self._rejected_seen = 0
        # Not in the state_dict, which stays torch.nn's; a buffer, so that it lives on the layer's device.
        counter = torch.zeros((), dtype=torch.long, device=device) if self.track_running_stats else None
        self.register_buffer("_rejected", counter, persistent=False)
        per_domain.add_domains(self, domains, domain_affine)
        self._widen_buffers({})
        self.staleness = Staleness(self.weight, self.running_mean)

    @property
    def tracks(self) -> bool:
        """Whether there are running statistics."""
        return self.running_mean is not None and self.running_var is not None

    def running(self, domain: str | None = None) -> Running:
        """The buffers that a domain's statistics are committed to; those of the only one where there are no domains."""
        mean, var, tracked = (self._buffers.get(named(name, domain, self.domains)) for name in STATISTICS)
        if mean is None or var is None:
            raise ArgumentError(f"{self} keeps no running statistics; build it with track_running_stats=True.")
        return Running(mean, var, tracked, self._rejected)

    def enter(self, remember: Remember) -> None:
        """From here on statistics go there."""
        self.entered = (*self.entered, remember)
        self.remember = remember

    def leave(self, remember: Remember) -> None:
        """And from here on where they went before, unless another context has been entered meanwhile."""
        self.entered = _without(self.entered, remember)
        if self.entered:
            self.remember = self.entered[-1]
        else:  # the class's own: an attribute of the layer, even the same, would compile it anew
            self.__dict__.pop("remember", None)
            self.__dict__.pop("entered", None)

    def enter_domain(self, name: str) -> None:
        """From here on forwards are of this domain."""
        self.domains_entered = (*self.domains_entered, name)
        self.active_domain = name

    def leave_domain(self, name: str) -> None:
        """And from here on of the one before."""
        self.domains_entered = _without(self.domains_entered, name)
        self.active_domain = self.domains_entered[-1] if self.domains_entered else None

    def replace_running(self, domain: str | None, running: Running) -> None:
        """Puts other tensors in the place of the buffers."""
        for name, value in zip(STATISTICS, running[:3], strict=True):
            self._buffers[named(name, domain, self.domains)] = value
        self._buffers["_rejected"] = running.rejected

    def affine_of(self, domain: str | None) -> tuple[Tensor | None, Tensor | None]:
        """γ and β for a domain."""
        if not self.domain_affine:
            return self.weight, self.bias
        # As attributes: a parametrization, and DataParallel's replicas, have no parameters of these names.
        weight, bias = (getattr(self, named(name, domain, self.domains)) for name in PARAMETERS)
        return weight, bias

    def note(self, refused: Tensor | bool) -> None:
        """Warns of a rejected batch where that is known at once."""
        if refused is True:
            self._rejected_seen += 1
            warn_if(refused, self, stacklevel=6)  # from a forward: beyond what torch puts around it, to its caller

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

    def reset_running_stats(self) -> None:
        """Back to mean 0 and variance 1, nothing counted, in all domains; a frozen layer stays as it is."""
        # torch's `update_bn` resets every batch norm that it finds, and then measures none that is frozen.
        if self.frozen:
            return
        super().reset_running_stats()
        per_domain.reset(self, self.__dict__.get("domains", ()))
        self._reset_rejected()

    def reset_parameters(self) -> None:
        """Running statistics as by `reset_running_stats`, γ = 1 and β = 0 in all domains."""
        super().reset_parameters()
        per_domain.reset_affine(self, self.__dict__.get("domains", ()))

    def _reset_rejected(self) -> None:
        counter, beside = self._buffers.get("_rejected"), self.running_mean
        if counter is not None and beside is not None:
            self._buffers["_rejected"] = torch.zeros_like(counter, device=beside.device)
            self._rejected_seen = 0

    def _statistics_names(self) -> list[str]:
        """The buffers that hold a mean or a variance."""
        return [named(name, d, self.domains) for d in self.domains or (None,) for name in STATISTICS[:2]]

    def _widen_buffers(self, before: dict[str, Tensor | None]) -> None:
        """Keeps the running statistics in float32 at least: in half precision they stall or overflow."""
        for name in self._statistics_names():
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype in _NARROW:
                source = before.get(name)
                source = buffer if source is None or source.is_meta else source
                self._buffers[name] = source.to(device=buffer.device, dtype=torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stateful":
        before = {name: self._buffers.get(name) for name in self._statistics_names()}
        counted_on_meta = self._rejected is not None and self._rejected.is_meta
        super()._apply(fn, recurse)
        self._widen_buffers(before)
        if counted_on_meta:
            self._reset_rejected()  # to_empty() leaves arbitrary memory, which no state_dict fills
        self.staleness = Staleness(self.weight, self.running_mean)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        per_domain.fill_in(state_dict, prefix, self.domains, self.domain_affine)
        for d in self.domains or (None,):
            name = named("num_batches_tracked", d, self.domains)
            own = self._buffers.get(name)
            if own is not None and prefix + name not in state_dict:  # a checkpoint that lacks it
                state_dict[prefix + name] = torch.tensor(0) if own.is_meta else own
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._widen_buffers({})  # load_state_dict(assign=True) brings its own dtype
        counter, beside = self._rejected, self.running_mean
        if counter is not None and counter.is_meta and beside is not None and not beside.is_meta:
            self._reset_rejected()  # and its own device, to a layer built on "meta"
        self.staleness = Staleness(self.weight, self.running_mean)

    def __getstate__(self) -> dict[str, Any]:
        passing = ("remember", "active_domain", "entered", "domains_entered", "staleness", "shortcut")
        return {name: value for name, value in self.__dict__.items() if name not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.staleness = Staleness(self.weight, self.running_mean)
