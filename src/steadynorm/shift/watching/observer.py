"""Forward hooks that may look at a served batch, and that can neither change nor break what is served."""

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steadynorm.nn.examining import is_examining
from steadynorm.nn.watched import BatchNormLayer, ExampleMoments, channel_axis, example_moments, input_and_mask

__all__ = ["Look", "Observer", "measured"]

_NONE: Final[Mapping[str, Any]] = {}


@dataclass
class Look:
    """What is to be taken from one forward, and what was.

    Attributes:
        number: Of the forward, counted from 1.
        layers: At which layers.
        limit: At most so many neighbouring examples; None for all.
        start: Where they start in the batch, as a share of the room there is, in [0, 1).
        taken: The measured examples by layer.
    """

    number: int
    layers: frozenset[str]
    limit: int | None = None
    start: float = 0.0
    taken: dict[str, ExampleMoments] = field(default_factory=dict[str, ExampleMoments])

    def see(self, name: str, layer: BatchNormLayer, x: Tensor, mask: Tensor | None = None) -> None:
        """Measures a layer's input, the first time that the layer runs in this forward."""
        if name not in self.layers or name in self.taken:
            return
        found = measured(x, layer, mask, self.limit, self.start)
        if found is not None:
            self.taken[name] = found


def measured(
    x: Tensor, layer: BatchNormLayer, mask: Tensor | None = None, limit: int | None = None, start: float = 0.0
) -> ExampleMoments | None:
    """Per-example moments of a layer's input; None where it cannot be read: a trace, a transform, no examples."""
    if layer.training or not _readable(x) or x.dim() < 2 or x.shape[0] == 0:
        return None
    if limit is not None and x.shape[0] > limit:
        first = int(start * (x.shape[0] - limit + 1))
        x = x[first : first + limit]
        mask = None if mask is None else mask[first : first + limit] if mask.shape[0] > 1 else mask
    with torch.no_grad():
        return example_moments(x, channel_axis(layer), mask)


def _readable(x: Tensor) -> bool:
    """Whether x holds values of its own: no fake, meta or wrapped tensor, none in a trace, transform or capture."""
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if type(x) not in (Tensor, nn.Parameter) or x.is_meta or not x.is_floating_point():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):  # pyright: ignore
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


class _Local(threading.local):
    """What one thread's forward is about; threads that serve one model at a time do not see each other's."""

    look: Look | None = None
    started: float = 0.0
    own: float = 0.0
    handles: tuple[RemovableHandle, ...] = ()


class _Hook:
    """A hook that is silent under a compiler, and that copies of the model, or a pickled one, do not take along."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.call(*args)

    def __reduce__(self) -> tuple[type["_Silent"], tuple[()]]:
        return _Silent, ()


class _Silent:
    def __call__(self, *args: Any) -> None:
        """What a copied model has instead."""


class Observer:
    """Calls back around every forward of a model in evaluation mode, whichever thread it runs in.

    Between looks a single hook is there, in front of the model: each further one costs microseconds in every forward.
    The others are put on for the forward that is looked at, and are idle in other threads' forwards meanwhile.

    Args:
        model: The model.
        layers: Its layers to look at.
        begin: Called before a forward; what it returns is looked for, and the forward timed.
        end: Called after a forward that was looked at: what was looked for, the forward's own seconds, and the seconds
            that looking took.
        fail: Called with any exception that these raise.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[str, BatchNormLayer]],
        begin: Callable[[], Look | None],
        end: Callable[[Look, float, float], None],
        fail: Callable[[Exception], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._layers = model, dict(layers)
        self._begin, self._end, self._fail, self._clock = begin, end, fail, clock
        self._local = _Local()
        self._handle: RemovableHandle | None = None
        self._lock = threading.Lock()
        self._open: dict[int, RemovableHandle] = {}  # of looks that are on their way, in whichever thread
        self._stale: list[RemovableHandle] = []  # of forwards that raised

    def attach(self) -> None:
        """Puts the hook on, once."""
        if self._handle is None:
            self._handle = self._model.register_forward_pre_hook(_Hook(self._before))

    def detach(self) -> None:
        """Takes it off, and what looks have put on: also those of threads that ended in the middle of a forward."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        with self._lock:
            left = list(self._open.values())
            self._open.clear()
        for handle in left:
            handle.remove()

    def idle_cost(self, repeats: int = 200) -> float:
        """Seconds that the hook adds to a forward not looked at: eight times what it adds to an empty module's.

        Eight times, because there it runs from warm caches, and around a model's own work it does not.
        """
        bare, hooked = nn.Identity().eval(), nn.Identity().eval()
        hooked.register_forward_pre_hook(_Hook(lambda *_: None))
        value = torch.empty(0)

        def seconds(module: nn.Module) -> float:
            entered = self._clock()
            for _ in range(repeats):
                module(value)
            return (self._clock() - entered) / repeats

        each = min(seconds(hooked) for _ in range(5)) - min(seconds(bare) for _ in range(5))
        return 8 * max(each, 0.0)

    def _before(self, model: nn.Module, *_: Any) -> None:
        if model.training or is_examining():
            return
        local = self._local
        try:
            if self._stale or local.look is not None:  # the second: a forward that was interrupted without its hooks
                self._leave()
            look = self._begin()
            if look is None:
                return
            entered = self._clock()  # not before: a clock of CPU time is a call into the system, in every forward
            self._enter(look)
            local.look, local.started = look, self._clock()
            local.own = local.started - entered
        except Exception as error:
            self._fail(error)

    def _enter(self, look: Look) -> None:
        """Puts on the hooks that this look needs.

        Other threads may be in the middle of a forward meanwhile: they take the hooks that they find, which are idle
        there, and may call those of the layers without the keyword arguments.
        """
        at = [
            self._layers[name].register_forward_pre_hook(_Hook(self._at(name)), with_kwargs=True)
            for name in look.layers
        ]
        # Called where the forward raises as well, so that nothing is left on the model then.
        self._local.handles = (*at, self._model.register_forward_hook(_Hook(self._after), always_call=True))
        with self._lock:
            self._open |= {handle.id: handle for handle in self._local.handles}

    def _leave(self) -> None:
        local = self._local
        handles, local.handles, local.look = local.handles, (), None
        with self._lock:
            stale, self._stale = self._stale, []
            for handle in (*handles, *stale):
                self._open.pop(handle.id, None)
        for handle in (*handles, *stale):
            handle.remove()

    def _at(self, name: str) -> Callable[..., None]:
        local, clock = self._local, self._clock

        def before_layer(layer: BatchNormLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any] = _NONE) -> None:
            look = local.look
            if look is None:
                return
            entered = clock()
            try:
                x, mask = input_and_mask(args, kwargs)
                if x is not None:
                    look.see(name, layer, x, mask)
            except Exception as error:
                self._fail(error)
            took = clock() - entered
            local.own += took
            local.started += took

        return before_layer

    def _after(self, _model: nn.Module, _inputs: object, output: object = None) -> None:
        local = self._local
        look = local.look
        if look is None:
            return
        try:
            if output is None and sys.exc_info()[0] is not None:  # it raised: this was no served batch
                # torch is going through the model's hooks at this moment: they are taken off before the next forward.
                with self._lock:
                    self._stale += local.handles
                local.handles, local.look = (), None
                return
            forward = self._clock() - local.started
            entered = self._clock()
            self._leave()
            self._end(look, forward, local.own + self._clock() - entered)
        except Exception as error:
            self._fail(error)
