"""Programs of torch.export and what is in them: shared by the tests of exporting."""

import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

BATCH = Dim("batch", min=2)
NODE = "aten.batch_norm.default"


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ready(layer: nn.Module) -> Any:
    """With random γ and β."""
    for seed, parameter in enumerate(layer.parameters()):
        torch.nn.init.trunc_normal_(parameter, generator=torch.Generator().manual_seed(seed + 50))
    return layer


def exported(model: nn.Module, x: Tensor, strict: bool = False, **options: Tensor) -> ExportedProgram:
    """For a batch of any size."""
    shapes = {name: {0: BATCH} for name in ("input", *options)}
    return export(model, (x,), options, dynamic_shapes=shapes, strict=strict)


def calls(program: ExportedProgram) -> list[str]:
    """The operations of a program, those of graphs within its graph included."""
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"]


def is_aten_alone(program: ExportedProgram) -> bool:
    """Whether it runs without steadynorm, and lowers to what every reader of programs knows."""

    def known(op: torch._ops.OpOverload) -> bool:
        return torch.Tag.core in op.tags or str(op).startswith(("aten._assert", "aten._native_batch_norm_legit"))

    lowered = [n.target for n in program.run_decompositions().graph.nodes if n.op == "call_function"]
    ours = [name for name in calls(program) if "steadynorm" in name]
    return not ours and all(known(op) for op in lowered if isinstance(op, torch._ops.OpOverload))


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)
