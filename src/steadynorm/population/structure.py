"""What a model's structure, its optimizer and its process group say: biases, weight decay, layers that do not sync."""

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import distributed, fx, nn
from torch.nn.modules.conv import _ConvNd as Conv  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import ArgumentError
from steadynorm.nn.base import BatchNorm
from steadynorm.nn.watched import BatchNormLayer
from steadynorm.population.findings import Finding

__all__ = ["from_optimizer", "from_structure", "from_sync"]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, BatchNormLayer) or super().is_leaf_module(m, module_qualified_name)


def from_structure(model: nn.Module) -> list[Finding]:
    """A bias before each batch norm that takes it out again, and layers that keep no running statistics.

    Example:
        >>> [f.kind for f in from_structure(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))]
        ['bias before batch norm']
    """
    modules = dict(model.named_modules())
    findings: list[Finding] = []
    for name, feeder in _feeders(model, modules).items():
        bias = getattr(modules[feeder], "bias", None)
        if isinstance(modules[feeder], (nn.Linear, Conv)) and bias is not None:
            findings.append(
                Finding(
                    "bias before batch norm",
                    "note",
                    name,
                    f"{feeder} has a bias, which {name} subtracts again with the mean.",
                    {"bias_of": feeder, "parameters": int(bias.numel())},
                    f"Build {feeder} with bias=False; β does its work. Harmless, except for {bias.numel()} parameters.",
                )
            )
    for name, module in modules.items():
        if isinstance(module, BatchNormLayer) and module.running_mean is None:
            findings.append(
                Finding(
                    "no running statistics",
                    "note",
                    name,
                    "track_running_stats=False: in evaluation, too, the output depends on the batch.",
                    {"channels": module.num_features},
                    "Build it with track_running_stats=True unless that is meant.",
                )
            )
    return findings


def _feeders(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Which module feeds each batch norm: from the traced graph, else from the order in each Sequential."""
    found: dict[str, str] = {}
    try:
        with torch.random.fork_rng(devices=[]):
            graph = _Tracer().trace(_unhooked(copy.deepcopy(model)))
    except Exception:  # whatever the user's forward does under tracing: the order in Sequentials is left
        graph = None
    if graph is not None:
        for node in graph.nodes:
            if node.op == "call_module" and isinstance(modules.get(str(node.target)), BatchNormLayer) and node.args:
                source: Any = node.args[0]
                if isinstance(source, fx.Node) and source.op == "call_module":
                    found[str(node.target)] = str(source.target)
        return found
    for name, module in modules.items():
        if isinstance(module, nn.Sequential):
            names = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
            for before, after in pairwise(names):
                if isinstance(modules.get(after), BatchNormLayer) and before in modules:
                    found[after] = before
    return found


def _unhooked(model: nn.Module) -> nn.Module:
    """A copy to be traced: a forward may note things down on its modules, and hooks would be given proxies."""
    for module in model.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(module, kind).clear()
    return model


def from_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Finding]:
    """γ and β in a parameter group with weight decay.

    Raises:
        ArgumentError: `optimizer` is none.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    decays = {id(p): float(g.get("weight_decay", 0) or 0) for g in optimizer.param_groups for p in g["params"]}
    findings: list[Finding] = []
    for name, module in model.named_modules():
        if isinstance(module, BatchNormLayer):
            hit = {key: decays.get(id(p), 0.0) for key, p in module.named_parameters(recurse=False)}
            hit = {key: decay for key, decay in hit.items() if decay > 0}
            if hit:
                decay = max(hit.values())
                findings.append(
                    Finding(
                        "weight decay on batch norm",
                        "warning",
                        name,
                        f"{' and '.join('γ' if k == 'weight' else 'β' for k in hit)} decay by {decay:g} a step.",
                        {"weight_decay": decay, "parameters": sum(getattr(module, key).numel() for key in hit)},
                        "Put γ and β (and biases) into a parameter group with weight_decay=0: decaying them pulls "
                        "channels towards 0 and regularises nothing.",
                        0.3,
                    )
                )
    return findings


def from_sync(model: nn.Module, expected: bool | None) -> list[Finding]:
    """Layers whose statistics are each rank's own, where several ranks train together.

    Args:
        model: Its batch norms are looked at.
        expected: Whether they should sync; None: if a process group of more than one rank is initialised.
    """
    ranks = 1
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
    if not (ranks > 1 if expected is None else expected):
        return []
    return [
        Finding(
            "sync absent",
            "warning",
            name,
            "Each rank normalises by its own part of the batch, and keeps its own running statistics.",
            {"ranks": ranks, "layer_type": type(layer).__name__},
            "Convert the model before training: steadynorm.sync_(model), or nn.SyncBatchNorm.convert_sync_batchnorm.",
            0.7,
        )
        for name, layer in _plain_layers(model)
    ]


def _plain_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            if module.process_group is None:
                yield name, module
        elif isinstance(module, BatchNormLayer) and not isinstance(module, nn.SyncBatchNorm):
            yield name, module
