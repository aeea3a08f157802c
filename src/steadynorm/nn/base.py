"""What the three layers share: which statistics normalise a batch, and that they are handed on to be remembered."""

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from steadynorm.activations import ActivationLike, resolve
from steadynorm.errors import ArgumentError, ConversionWarning, ModelError, ShapeError
from steadynorm.nn.correcting import Corrector
from steadynorm.nn.domains import checked_domains
from steadynorm.nn.exporting import aten_step
from steadynorm.nn.renorm import Renorm
from steadynorm.nn.shortcuts import lay_shortcut, take_shortcut
from steadynorm.nn.state import Stateful
from steadynorm.nn.tracing import is_proxy, leaf_call
from steadynorm.ops.autograd import Correction
from steadynorm.ops.commit import Running, recomputing
from steadynorm.ops.ghost import smallest_chunk
from steadynorm.ops.groups import GroupLike, GroupReference, resolve_group
from steadynorm.ops.reference import Operands
from steadynorm.step import Masked, Settings, layout_of, refuse_single_value, run

if TYPE_CHECKING:
    from steadynorm.ops.cpu.shortcut import Shortcut

__all__ = ["BatchNorm", "SingleValue"]

SingleValue = Literal["error", "running", "beta"]


class BatchNorm(Stateful):
    """The common body of `BatchNorm1d`, `2d` and `3d`; not used by itself."""

    _dims: tuple[int, ...] = ()
    _shape = ""
    frozen_affine: bool = False
    _corrector: Corrector | None = None
    shortcut: "Shortcut | None" = None
    unfrozen_grad: dict[str, bool] = {}  # noqa: RUF012 (replaced by freeze_, never changed)

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
        masked: Masked = "zero",
        ghost_batch_size: int | None = None,
        renorm: Renorm | None = None,
        domains: Sequence[str] | None = None,
        domain_affine: bool = False,
        process_group: GroupLike | None = None,
    ) -> None:
        if single_value not in get_args(SingleValue):
            raise ArgumentError(f"single_value must be one of {get_args(SingleValue)}, got {single_value!r}.")
        if masked not in get_args(Masked):
            raise ArgumentError(f"masked must be one of {get_args(Masked)}, got {masked!r}.")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ArgumentError(f"momentum must lie in [0, 1], the share of the new batch, or be None; got {momentum}.")
        whole = ghost_batch_size is None or type(ghost_batch_size) is int
        if not whole or (ghost_batch_size is not None and ghost_batch_size < 1):
            raise ArgumentError(
                f"ghost_batch_size must be a number of examples >= 1, or None; got {ghost_batch_size!r}."
            )
        if renorm is not None and not isinstance(renorm, Renorm):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(f"renorm must be a steadynorm.Renorm or None, got {renorm!r}.")
        needs_tracking = {'single_value="running"': single_value == "running", "renorm": renorm, "domains": domains}
        for option, given in needs_tracking.items():
            if given and not track_running_stats:
                raise ArgumentError(f"{option} needs track_running_stats=True: there are no running statistics to use.")
        if domain_affine and not (affine and domains):
            raise ArgumentError("domain_affine=True needs affine=True and domains=(...): a weight and bias for each.")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.activation = resolve(activation)
        self.channel_dim = channel_dim
        self.single_value: SingleValue = single_value
        self.masked: Masked = masked
        self.ghost_batch_size = ghost_batch_size
        self._corrector = None if renorm is None else Corrector(renorm)
        self._group = GroupReference(process_group)
        self._init_state(checked_domains(domains), domain_affine, device)

    @property
    def renorm(self) -> Renorm | None:
        """The schedule of batch renormalization, or None."""
        return None if self._corrector is None else self._corrector.renorm

    @property
    def process_group(self) -> GroupLike | None:
        """The ranks that this layer's batch is merged over; `steadynorm.sync_` sets it for a whole model."""
        return self._group.group

    @process_group.setter
    def process_group(self, group: GroupLike | None) -> None:
        self._group = GroupReference(group)

    def reset_running_stats(self) -> None:
        """As torch's, in all domains; a frozen layer stays as it is."""
        super().reset_running_stats()
        if self._corrector is not None and not self.frozen:
            self._corrector.forget()

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Normalises `input`; in training mode also hands its statistics on to be committed. See the class."""
        # (A compiler would guard that there is no shortcut, and compile again once an eager step has laid one.)
        plain = mask is None and sample_weight is None and not torch.compiler.is_compiling()
        if plain and self.shortcut is not None:
            taken = take_shortcut(self, input, residual)
            if taken is not None:
                self.note(taken[1])
                return taken[0]
        if is_proxy(input) or is_proxy(residual) or is_proxy(mask) or is_proxy(sample_weight):
            return leaf_call(self, input, residual=residual, mask=mask, sample_weight=sample_weight)
        self._check_input_dim(input)
        layout = layout_of(input, self.channel_dim)
        if layout.channels != self.num_features:
            raise ShapeError(
                f"{self} expected {self.num_features} channels in dimension {self.channel_dim}, got {layout.channels}: "
                f"an input of shape {tuple(input.shape)}."
            )
        domain = self._domain_in_use() if self.domains else None
        running = self.running(domain) if self.tracks else None
        by_batch = running is None or (self.training and not self.frozen)
        group = resolve_group(self._group.group) if by_batch and self.training else None
        if by_batch and group is None and smallest_chunk(layout, input.shape[0], self.ghost_batch_size) == 1:
            by_batch = self._single_value_by_batch(input, alone=layout.count == 1)
        weight, bias = self.affine_of(domain)
        if running is not None and not torch.compiler.is_compiling() and not self.staleness.settled:
            self.staleness.look(weight, running.mean, evaluating=not by_batch and not self.frozen)
        if self.frozen_affine:  # whatever became of requires_grad meanwhile
            weight, bias = (None if t is None else t.detach() for t in (weight, bias))
        correct = self._correction(running) if by_batch and self.training else None
        settings = Settings(self.eps, self.activation, group, self.ghost_batch_size, self.masked, correct)
        if by_batch and torch.compiler.is_exporting():
            operands = Operands(input, weight, bias, residual, sample_weight, mask)
            exported = aten_step(self, operands, running, layout, settings)
            if exported is not None:
                return exported
        if plain and by_batch:
            taken = lay_shortcut(self, Operands(input, weight, bias, residual), layout, settings)
            if taken is not None:
                self.note(taken[1])
                return taken[0]
        y, statistics = run(
            input, None if running is None else running.mean, None if running is None else running.var,
            weight, bias, by_batch, residual, mask, sample_weight, layout, settings,
        )  # fmt: skip
        if self.training and statistics is not None and running is not None:
            self.note(self.remember(self, domain, statistics, sample_weight is not None))
        return y

    def _domain_in_use(self) -> str:
        """The domain that a `with domain(...)` around this forward has named."""
        if self.active_domain is not None:
            return self.active_domain
        by_batch_alone = self.training and not (
            self.frozen or self.domain_affine or self.renorm or self.single_value == "running"
        )
        if by_batch_alone and not torch.compiler.is_compiling() and recomputing():
            return self.domains[0]  # a checkpoint's second forward, outside of the `with`, needs none
        raise ArgumentError(
            f"{self} keeps separate statistics for the domains {', '.join(map(repr, self.domains))}. Say which one "
            "this batch is of: `with steadynorm.domain(model, name): ...` (backward belongs inside too where "
            "activation checkpointing runs a forward again)."
        )

    def _single_value_by_batch(self, input: Tensor, alone: bool) -> bool:
        """Whether one value per channel is normalised by itself; refuses it if nothing else was asked for.

        Renorm asks for the running statistics where the value is `alone`, not where each chunk of a batch holds a
        single one: none of them would ever be committed.
        """
        if self.single_value == "error" and not (self.renorm and alone):
            with_statistics = 'switch to evaluation with model.eval(), or choose single_value="running" or "beta"'
            without = 'choose single_value="beta", or track_running_stats=True'
            chunks = "" if alone else "a larger ghost_batch_size, or "
            refuse_single_value(input, str(self), chunks + (with_statistics if self.tracks else without))
        return self.single_value == "beta"

    def _correction(self, running: Running | None) -> Correction | None:
        corrector = self._corrector
        if corrector is None or running is None:
            return None
        return lambda statistics, weight, bias: corrector.correct(statistics, running, weight, bias, self.eps)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._dims:
            wanted = " or ".join(f"{d}-D" for d in self._dims)
            raise ShapeError(f"{self} expected {wanted} input {self._shape}, got shape {tuple(input.shape)}.")

    @property
    def _options(self) -> dict[str, Any]:
        """The options that torch.nn's layer lacks, where they differ from the defaults."""
        options = {
            "activation": self.activation,
            "channel_dim": self.channel_dim,
            "single_value": self.single_value,
            "masked": self.masked,
            "ghost_batch_size": self.ghost_batch_size,
            "renorm": self.renorm,
            "domains": self.domains or None,
            "domain_affine": self.domain_affine,
            "process_group": self.process_group,
            "frozen": self.frozen,
        }
        plain = {"channel_dim": 1, "single_value": "error", "masked": "zero", "domain_affine": False, "frozen": False}
        return {name: value for name, value in options.items() if value != plain.get(name)}

    def extra_repr(self) -> str:
        """torch.nn's, and what differs from the defaults of the options that torch.nn lacks."""
        written = [f"{k}={v}" if k == "activation" else f"{k}={v!r}" for k, v in self._options.items()]
        return ", ".join([super().extra_repr(), *written])

    def __prepare_scriptable__(self) -> None:  # what torch.jit.script calls before it compiles a model
        raise ModelError(
            f"torch.jit.script cannot compile {self}. Call steadynorm.revert_(model) first, which makes it torch.nn's "
            "layer again and says what torch's lacks; or use torch.export or torch.compile, which take it as it is."
        )

    @property
    def qconfig(self) -> Any:
        """torch.ao's attribute, absent until it is set.

        torch's `convert_sync_batchnorm` looks for it on every layer it replaces, which is the one moment at which a
        layer can say what will be lost.
        """
        if "qconfig" in self.__dict__:
            return self.__dict__["qconfig"]
        lost = ", ".join(name for name in self._options if name != "process_group")
        if lost and sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":  # pyright: ignore[reportPrivateUsage]
            warnings.warn(
                f"torch.nn.SyncBatchNorm.convert_sync_batchnorm drops {lost} of {self}: the model computes something "
                "else from here on. Use steadynorm.sync_(model, process_group) on the model as it was.",
                ConversionWarning,
                stacklevel=3,
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'qconfig'")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        self.__dict__["qconfig"] = value
