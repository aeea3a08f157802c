"""`export`: a model in evaluation as a program that runs without this package, checked before it is written."""

import contextlib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import ArgumentError, MissingDependencyError, ModelError
from steadynorm.files.aside import write_aside
from steadynorm.surgery.outputs import bound_of, called, error_of, floating
from steadynorm.surgery.sites import required_model

__all__ = ["ExportReport", "export"]

Run: TypeAlias = Callable[[Any], Sequence[Tensor]]

_RUNNERS: Final = {".pt2": "torch", ".onnx": "onnxruntime"}
_MISSING: Final = 'ONNX export needs onnx and onnxscript: pip install "steadynorm[onnx]", or write a .pt2.'


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the model.

    Attributes:
        path: The file.
        bytes: Its size.
        batch: "any" if the program takes any number of examples, or else the number that it takes.
        checked: What ran the program for the check, with its version; if nothing could, why.
        error: max |program - model| / max |model|, over the example as a whole and one by one; None if not checked.
        bound: What the error had to stay below.
    """

    path: str
    bytes: int
    batch: str
    checked: str
    error: float | None
    bound: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        size = f"{self.path}: {self.bytes / 1e6:.3g} MB, "
        size += "any number of examples" if self.batch == "any" else f"{self.batch} examples"
        if self.error is None:
            return f"{size}; not run: {self.checked}"
        return (
            f"{size}; off by {self.error:.2g} of the output's scale at most (bound {self.bound:.0e}), by {self.checked}"
        )


def export(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    fixed_batch: bool = False,
    verify: bool = True,
) -> ExportReport:
    """Writes a model in evaluation, folded or not, as a program of `torch.export` or as ONNX.

    The program consists of plain operators, so it runs without steadynorm: a batch norm is y = a x + b with a and b
    computed from γ, β and the stored mean and (unbiased) variance, and where `fold` has taken it away, nothing.

    Before it is written, the program runs on the example, as a whole and example by example, and must give what the
    model gives: .pt2 by torch, .onnx by onnxruntime where that is installed.

    Args:
        model: In evaluation; it is not changed.
        example: Inputs of the model: a tensor, a tuple of arguments or a mapping of named ones. The first axis of each
            tensor counts the examples.
        path: Where to: a .pt2 file (`torch.export.save`), or an .onnx file (needs the extra `onnx`). Written aside and
            renamed, never half.
        fixed_batch: Whether the program takes just as many examples as there are in `example`, for models that cannot
            take any number. By default it takes any, and its axis is named "batch".
        verify: Whether the program runs on the example before it is written.

    Returns:
        An `ExportReport`.

    Raises:
        ArgumentError: `model` is no module, or the path has another suffix.
        ModelError: The model is in training, cannot be exported, or the program gives something else.
        MissingDependencyError: An .onnx file, and onnx is not installed.

    Source:
        https://docs.pytorch.org/docs/stable/export.html

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        >>> report = export(model, torch.randn(4, 3), Path(tempfile.mkdtemp()) / "model.pt2")
        >>> report.batch, report.error < 1e-5
        ('any', True)
    """
    required_model(model, "export")
    where = Path(path)
    if where.suffix not in _RUNNERS:
        raise ArgumentError(f"export writes {' or '.join(_RUNNERS)} files, got {where}.")
    if any(module.training for module in model.modules()):
        raise ModelError("export needs a model in evaluation: call model.eval() first, or sn.fold(model.eval()).")
    _required(where)
    args, kwargs = _arguments(example if fixed_batch else _several(example))
    wanted = floating(called(model, example))
    if not wanted:
        raise ModelError("export needs a model whose outputs are tensors of floating-point numbers.")
    content = _program(model, args, kwargs, where.suffix, fixed_batch)
    error, bound, checked = None, None, "not asked for"
    if verify:
        runner = _RUNNERS[where.suffix]
        checked = f"{runner} {_version(runner)}"
        try:
            run = (_by_torch if where.suffix == ".pt2" else _by_onnxruntime)(content, model)
            error, bound = max(_errors(model, example, run, fixed_batch), key=_size), bound_of(wanted)
        except ModelError:
            raise
        except Exception as failed:  # onnxruntime is missing, or has no kernel for a dtype
            checked = (
                "onnxruntime is not installed" if isinstance(failed, ImportError) else f"{checked}: {_line(failed)}"
            )
    if error is not None and bound is not None and not error <= bound:
        raise ModelError(
            f"the exported program differs from the model by {error:.2g} of the output's scale, beyond {bound:.0e}; "
            "nothing was written. A forward that depends on its input's values, or draws at random, can be why."
        )
    try:
        write_aside({where: content})
    except OSError as refused:
        raise ModelError(f"cannot write {where}: {refused.strerror or refused}. Choose another folder.") from refused
    batch = str(_examples(example)) if fixed_batch else "any"
    return ExportReport(str(where), len(content), batch, checked, error, bound)


def _size(error: float) -> float:
    return float("inf") if error != error else error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _required(where: Path) -> None:
    if where.suffix == ".onnx":
        try:
            import onnx  # noqa: F401  # pyright: ignore
            import onnxscript  # noqa: F401  # pyright: ignore
        except ImportError as error:
            raise MissingDependencyError(_MISSING) from error


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), {str(name): value for name, value in cast("Mapping[str, Any]", example).items()}
    return (example if isinstance(example, tuple) else (example,)), {}


def _examples(example: Any) -> int:
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor) and t.dim()]
    return tensors[0].shape[0] if tensors else 0


def _several(example: Any) -> Any:
    """With two examples at least: torch takes one for a size that is always one."""
    return _each(example, lambda t: torch.cat([t, t]) if t.shape[0] == 1 else t)


def _each(example: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The tensors with examples, changed."""
    count = _examples(example)

    def changed(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value

    given = dict(cast("Mapping[str, Any]", example)) if isinstance(example, Mapping) else example
    return pytree.tree_map(changed, given)


def _program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], suffix: str, fixed_batch: bool) -> bytes:
    """The file's content."""
    count = _examples((args, kwargs))

    def shapes(batch: Any) -> Any:
        def axes(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.dim() and value.shape[0] == count and not fixed_batch
            return {0: batch} if whole else None

        some, named = pytree.tree_map(axes, (args, kwargs))
        return dict(inspect.signature(model.forward).bind(*some, **named).arguments)

    try:
        with _quiet(), _tensors_alone(model) if suffix == ".onnx" else contextlib.nullcontext():
            free = shapes(torch.export.Dim("batch", min=1))
            program = torch.export.export(model, args, kwargs, dynamic_shapes=free)
            if suffix == ".pt2":
                torch.export.save(program, file := io.BytesIO())
                return file.getvalue()
            named: Any = {"dynamic_shapes": shapes("batch")}
            exported: Any = torch.onnx.export(program, args, kwargs=kwargs, dynamo=True, verbose=False, **named)
            return cast(bytes, exported.model_proto.SerializeToString())
    except Exception as error:  # of which an exporter raises any
        advice = "" if fixed_batch else " If it cannot take any number of examples, export with fixed_batch=True."
        raise ModelError(
            f"this {type(model).__name__} cannot be exported: {type(error).__name__}: {_line(error)}.{advice}"
        ) from error


@contextlib.contextmanager
def _tensors_alone(model: nn.Module) -> Generator[None]:
    """Without what else a model gives, such as sizes: the outputs of ONNX are tensors."""

    def hook(_: nn.Module, __: object, output: Any) -> Any:
        leaves = pytree.tree_leaves(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return output if len(tensors) == len(leaves) else tensors

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without the exporters' talk of libraries that are not installed, and of their own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _by_torch(content: bytes, _: nn.Module) -> Run:
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda example: floating(called(module, example))


def _by_onnxruntime(content: bytes, model: nn.Module) -> Run:
    import onnxruntime  # pyright: ignore

    runtime: Any = onnxruntime
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names: list[str] = [one.name for one in session.get_inputs()]
    signature = inspect.signature(model.forward)

    def run(example: Any) -> Sequence[Tensor]:
        args, kwargs = _arguments(example)
        given = signature.bind(*args, **kwargs).arguments
        tensors = [t for t in pytree.tree_leaves(list(given.values())) if isinstance(t, Tensor)]
        inputs = dict(zip(names, tensors, strict=True)) if len(names) == len(tensors) else {n: given[n] for n in names}
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
        return floating([torch.from_numpy(array) for array in session.run(None, feed)])

    return run


def _errors(model: nn.Module, example: Any, run: Run, fixed_batch: bool) -> Iterator[float]:
    examples = [example]
    if not fixed_batch:
        examples += [_each(example, lambda t, i=i: t[i : i + 1]) for i in range(_examples(example))]
    for one in examples:
        wanted, got = floating(called(model, one)), run(one)
        if len(wanted) != len(got):
            raise ModelError(f"the exported program gives {len(got)} tensors, the model {len(wanted)}.")
        yield error_of([t.cpu() for t in got], [t.cpu() for t in wanted])
