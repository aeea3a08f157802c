"""`insert`: a plain model with a batch norm before or after each hidden nonlinearity."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, Unpack, cast, get_args

from torch import nn

from steadynorm.errors import ArgumentError
from steadynorm.init import initialize_
from steadynorm.nn.base import BatchNorm
from steadynorm.nn.batchnorm import BatchNorm1d
from steadynorm.surgery.calls import Calls
from steadynorm.surgery.converting import Options
from steadynorm.surgery.flow import Label
from steadynorm.surgery.insertion_report import Insertion, InsertionReport
from steadynorm.surgery.layers import is_foldable
from steadynorm.surgery.operations import is_activation
from steadynorm.surgery.patterns import View
from steadynorm.surgery.placing import KINDS, Placing, Row, Spot, Where
from steadynorm.surgery.putting import put_
from steadynorm.surgery.reading import Reading, Root
from steadynorm.surgery.sites import Only, chosen, copied, required_model, sites_of

__all__ = ["InsertOptions", "InsertedModel", "insert"]


class InsertOptions(Options, total=False):
    """The options of the layers that are put in; see `BatchNorm1d`."""

    eps: float
    affine: bool
    track_running_stats: bool


class InsertedModel(Protocol):
    """What `insert` adds to the model it returns."""

    insert_report: InsertionReport


class _Way(NamedTuple):
    """One trace of a part of the model."""

    reading: Reading
    root: Root
    view: View

    def calls(self, layer: str) -> int:
        """How often it calls a layer."""
        return self.view.calls[id(self.reading.model.get_submodule(layer))]


_ELSEWHERE: Final = {
    "activation": "the model applies its own after the layer",
    "masked": "the model hands no mask to the layer",
    "channel_dim": "it is the layer's before it",
    "bias": "it stands for the bias that is dropped",
    **dict.fromkeys(("num_features", "device", "dtype"), "they are those of the layer before it"),
}


def insert(
    model: nn.Module,
    where: Where = "before",
    *,
    example: Any = None,
    only: Only = None,
    initialize: bool = False,
    zero_gamma: bool = False,
    **options: Unpack[InsertOptions],
) -> nn.Module:
    """A copy of a plain model with a batch norm before, or after, each hidden nonlinearity.

        before      f(W x + b)   becomes   f(γ (W x - μ) / sqrt(σ² + ε) + β)
        after       f(W x + b)   becomes   γ (f(W x + b) - μ) / sqrt(σ² + ε) + β

    with μ and σ² (biased) of the batch in training, the running ones (unbiased) in evaluation. Before the nonlinearity
    a bias b does nothing: μ takes it away again, and β stands for it. It is dropped. After the nonlinearity it does
    something, since f(z + b) is not f(z) + b; so it stays, and so do the biases of the layers behind.

    | where | what is put there |
    | --- | --- |
    | behind a child of an `nn.Sequential` | a child; those behind it are renumbered, unless they have names |
    | behind a layer anywhere else | a child of the layer, `<layer>.batchnorm`; other names stay |
    | behind a nonlinearity that is a module of its own | an `nn.Sequential` of the two in its place |
    | behind one that is not (`F.relu`, a module used twice) | `<layer>.input_batchnorm` of the layer that follows |

    A layer with a batch norm inside it stays what it is, a `nn.Linear` say, of a subclass; the forward of the model is
    not written anew, so its loops, conditions and other methods go on. Layers: Linear, Conv1d, 2d, 3d, ConvTranspose1d,
    2d, 3d. Between layer and nonlinearity there may be pooling, dropout, reshaping, addition and concatenation: where a
    residual branch is added to a shortcut, the batch norm goes on the branch's end, and on the shortcut's if it ends
    in a layer.

    Left as they are, with the reason in the report: the last nonlinearities, after which no layer with weights comes,
    and the last layer; places where a normalisation stands already; layers that are used twice, share their weights,
    are parametrised or have hooks; results that something else uses, too. The model is read by `torch.fx`; parts that
    it cannot trace are read by themselves, and changed only where `example` shows that they are called once.

    Args:
        model: It is not changed.
        where: "before" or "after" the nonlinearities.
        example: An input of the model: a tensor, a tuple of arguments or a dict of named ones. It is run once, in
            evaluation, to count calls and axes. Without it the batch norm of a linear layer gets `channel_dim=-1`,
            which holds for inputs of 2 and 3 axes.
        only: Which layers get a batch norm before or after the nonlinearity that they feed: a predicate
            `(name, module) -> bool`, or a name or a list of names, with `*` and `?` if wanted, of layers or of modules
            that hold them. All by default.
        initialize: Whether to draw the copy's weights anew by `sn.init.initialize_`, under torch's random state.
        zero_gamma: Whether the batch norms at the ends of residual branches start with γ = 0, so that each block starts
            as its shortcut.
        **options: Of the layers: `momentum`, `eps`, `affine`, `track_running_stats`, `single_value`,
            `ghost_batch_size`, `renorm`, `domains`, `domain_affine`, `process_group`; see `sn.BatchNorm1d`.

    Returns:
        The new model, with an `insert_report` (an `InsertionReport`). If there is no place, a plain copy.

    Raises:
        ArgumentError: `model` is no module, `where` is neither, `only` fits nothing, or an option is unknown or out of
            range.
        ModelError: The model is TorchScript, cannot be copied, or does not take the example.

    Source:
        Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, section 3.2 (before, and the bias). Goyal et al. 2017,
        https://arxiv.org/abs/1706.02677, section 5.1 (γ = 0).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> print(insert(model).insert_report)
        1 batch norms inserted before nonlinearities, 1 dead biases dropped
          1: BatchNorm2d(8), 0 -> 2, bias dropped
          renumbered in nn.Sequential: 3 -> 4
    """
    required_model(model, "insert")
    if where not in get_args(Where):
        raise ArgumentError(f'where must be "before" or "after" the nonlinearity, got {where!r}.')
    _check(options, zero_gamma)
    sites = sites_of(model, is_foldable)
    layers = chosen(sites, only, "convolution or linear layer") if sites or only is not None else set[nn.Module]()
    wanted = {site.names[0] for site in sites if site.layer in layers}
    banned: dict[object, str] = {}
    calls = None if example is None else Calls(copied(model, "insert"), example)
    while True:
        readings = [Reading(copied(model, "insert").train(mode)) for mode in (True, False)]
        ways = [_Way(reading, root, view) for reading in readings for root in reading.roots for view in root.views]
        rows = _agreed(ways, [Placing(*way, where, wanted, calls, banned).make(zero_gamma) for way in ways])
        wrong = _wrong(readings, rows, options)
        if not wrong:
            break
        banned |= wrong
    made = copied(model, "insert")
    before = {id(module): name for name, module in made.named_modules()}
    norms = put_(made, _spots(rows), options)
    initialized = str(initialize_(made)) if initialize else ""
    for spot, norm in norms.items():
        if spot.zero:
            nn.init.zeros_(norm.weight)
    rows += _unread(model, rows)
    after = {id(module): name for name, module in made.named_modules()}
    names = {name: after[module] for module, name in before.items()}
    cast(InsertedModel, made).insert_report = InsertionReport(
        where,
        tuple(_said(label, one, names, norms, after) for label, one in rows),
        tuple(_renamed(made, before)),
        tuple({name: why for reading in readings for name, why in reading.untraced.items()}.items()),
        initialized,
    )
    return made


def _check(options: InsertOptions, zero_gamma: bool) -> None:
    known = tuple(name for kind in (InsertOptions, Options) for name in kind.__annotations__)
    unknown = [name for name in options if name not in known]
    if unknown:
        why = _ELSEWHERE.get(unknown[0])
        raise ArgumentError(
            f"insert takes the options {', '.join(dict.fromkeys(known))}; got {unknown[0]!r}"
            + (f": {why}." if why else ".")
        )
    given: dict[str, Any] = dict(options)
    BatchNorm1d(1, device="meta", **given)
    if zero_gamma and not options.get("affine", True):
        raise ArgumentError("zero_gamma=True needs affine=True: there is no gamma to start at zero.")


def _agreed(ways: Sequence[_Way], plans: Sequence[list[Row]]) -> list[Row]:
    """The rows that hold in both modes, whichever way a forward takes, and whichever optional arguments are given."""
    found = [set(_spots(plan)) for plan in plans]
    rows: dict[Row, None] = {}
    looked: set[Spot] = set()
    known: set[Label] = set()
    for plan in plans:
        for label, one in plan:
            if isinstance(one, str):
                if label not in known:
                    rows[label, one] = None
            elif one not in looked:
                looked.add(one)
                differs = any(one not in here and way.calls(one.layer) for here, way in zip(found, ways, strict=True))
                why = "what is around it depends on training, on the input, or on optional arguments"
                rows[label, why if differs else one] = None
        known |= {label for label, _ in plan}
    return list(rows)


def _wrong(readings: Sequence[Reading], rows: Sequence[Row], options: InsertOptions) -> dict[object, str]:
    """Tries the plan out: what is refused, since the forward calls something else than before then."""
    wrong: dict[object, str] = {}
    labels = {one: label for label, one in rows if isinstance(one, Spot)}
    for reading in readings:
        parts = [reading.model.get_submodule(root.name) for root in reading.roots]
        known = {id(module) for module in reading.model.modules()}
        layers = {spot: id(reading.model.get_submodule(spot.layer)) for spot in labels}
        norms = put_(reading.model, list(labels), options)
        for root, part in zip(reading.roots, parts, strict=True):
            here = [spot for spot in labels if spot.layer in root.own]
            if not here:
                continue
            why = "after it was put there, the forward would not call what it did before"
            try:
                views = reading.trace(root, part)
            except Exception as error:  # whatever a user's forward raises
                views, why = [], f"the forward needs the layers as they were ({type(error).__name__}: {error})"
            same = bool(views)
            for view, now in zip(root.views, views, strict=False):
                same = same and all(view.calls[one] == now.calls[one] for one in known & set(view.calls))
                same = same and all(view.calls[layers[spot]] == now.calls[id(norms[spot])] for spot in here)
            if not same:
                wrong |= {what: why for spot in here for what in (spot.key, labels[spot])}
    return wrong


def _unread(model: nn.Module, rows: Sequence[Row]) -> Iterator[Row]:
    """The modules of nonlinearities that no trace has."""
    seen = {label.module for label, _ in rows if not label.function}
    for name, module in model.named_modules():
        if is_activation(module) and name not in seen:
            yield Label(name, "", 1), "the forward does not call it, as far as it could be traced"


def _spots(rows: Sequence[Row]) -> list[Spot]:
    return [one for _, one in rows if isinstance(one, Spot)]


def _said(
    label: Label, one: Spot | str, names: Mapping[str, str], norms: Mapping[Spot, BatchNorm], after: Mapping[int, str]
) -> Insertion:
    text = label.text(names)
    if isinstance(one, str):
        return Insertion(text, why=one)
    return Insertion(
        text,
        after[id(norms[one])],
        f"{one.kind.__name__}({one.width}{', channel_dim=-1' if one.channel_dim == -1 else ''})",
        one.width,
        next(dims for dims, kind in KINDS.items() if kind is one.kind),
        names[one.layer],
        one.dead,
        one.zero,
    )


def _renamed(made: nn.Module, before: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    for name, module in made.named_modules():
        held = any(True for tensors in (module.parameters(False), module.buffers(False)) for _ in tensors)
        if held and before.get(id(module), name) != name:
            yield before[id(module)], name
