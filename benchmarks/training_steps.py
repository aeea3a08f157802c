"""A whole training step with torch's batch norm and with ours, fused, in the same places.

    python benchmarks/training_steps.py                     # two minutes on two idle cores
    python benchmarks/training_steps.py --models resnet18   # one of them, printed only
    python benchmarks/cpu_table.py                          # then writes the tables

A step is forward, cross-entropy, backward and an update by SGD with momentum. Both models start from the same weights,
and before they are timed, in turns, both must give the same loss and gradients: to twelve digits in float64 on a small
batch, and on the batch that is timed as closely as float32 allows.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpu import write
from cpu_peers import kept_for_backward
from cpu_timing import busy, interleaved, machine, percentiles
from models import MODELS, Norm, fused_norm, torch_norm

RESULTS = Path(__file__).resolve().parent / "results" / "training_steps.json"
SHAPES = {"mobilenet_v2": (32, 3, 96, 96), "resnet50": (8, 3, 160, 160), "resnet18": (16, 3, 128, 128)}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NORMS: dict[str, Norm] = {"eager": torch_norm, "ours": fused_norm}
SMALL = (4, 3, 64, 64)
# Relative differences of the loss and of the whole gradient. In float32, rounding decides whether an activation near 0
# is passed on, so that torch's own gradient is 0.2 to 2.6 % from that of the same network in float64.
TOLERANCE = {torch.float64: (1e-12, 1e-9), torch.float32: (1e-5, 6e-2)}


class Training:
    """A model in training on one batch."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor) -> None:
        self.model, self.x, self.target = model, x, target
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        """Of a training forward."""
        return nn.functional.cross_entropy(self.model(self.x), self.target)

    def step(self) -> None:
        """One whole step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def gradient(self) -> tuple[float, Tensor]:
        """The loss, and the gradient of all parameters in one vector; nothing is updated."""
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in self.model.parameters()])


def trainings(
    model: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype = torch.float32
) -> dict[str, Training]:
    """The same model with each norm, the same weights in the same places, on the same random batch."""
    torch.manual_seed(0)
    memory_format = LAYOUTS[layout]
    x = torch.randn(shape, dtype=dtype).to(memory_format=memory_format)
    target = torch.randint(1000, shape[:1])
    found: dict[str, Training] = {}
    weights = None
    for name, norm in NORMS.items():
        built = MODELS[model](norm).to(dtype=dtype, memory_format=memory_format)
        if weights is None:
            weights = built.state_dict()
        built.load_state_dict(weights)
        found[name] = Training(built, x, target)
    return found


def difference(pair: dict[str, Training]) -> tuple[float, float]:
    """Relative differences of the losses, and of the gradients in Euclidean norm."""
    (loss, gradient), (other_loss, other_gradient) = (training.gradient() for training in pair.values())
    return abs(loss - other_loss) / abs(loss), float((gradient - other_gradient).norm() / gradient.norm())


def checked_difference(pair: dict[str, Training]) -> tuple[float, float]:
    """The same, where it is no more than the dtype allows.

    Raises:
        ArithmeticError: it is more.
    """
    loss, gradient = difference(pair)
    allowed = TOLERANCE[pair["ours"].x.dtype]
    if not (loss <= allowed[0] and gradient <= allowed[1]):
        raise ArithmeticError(f"the losses differ by {loss:.1e}, the gradients by {gradient:.1e}; allowed: {allowed}")
    return loss, gradient


def measure(model: str, shape: tuple[int, ...], layout: str, seconds: float) -> dict[str, Any]:
    """One model in one layout.

    Raises:
        ArithmeticError: the two networks do not compute the same.
    """
    checked_difference(trainings(model, SMALL, layout, torch.float64))
    pair = trainings(model, shape, layout)
    loss, gradient = checked_difference(pair)
    kept = {
        name: kept_for_backward(training.loss, list(training.model.parameters())) for name, training in pair.items()
    }
    samples = interleaved({name: training.step for name, training in pair.items()}, seconds)
    times = {name: percentiles([microseconds / 1e3 for microseconds in found]) for name, found in samples.items()}
    return {
        "name": f"{model} {layout}",
        "model": model,
        "shape": shape,
        "layout": layout,
        "rounds": len(samples["ours"]),
        "times_ms": times,
        "ours_over_eager": float(f"{times['ours'][1] / times['eager'][1]:.4g}"),
        "kept_bytes": kept,
        "difference": {"loss": float(f"{loss:.2g}"), "gradient": float(f"{gradient:.2g}")},
    }


def main() -> None:
    """Measures, writes a full run, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes by itself")
    parser.add_argument("--seconds", type=float, default=15.0, help="timing of a model and layout (default: 15)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training_steps.json if all are measured")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or (RESULTS if set(arguments.models) == set(SHAPES) else None)
    reason, load = busy()
    if reason and not arguments.anyway:
        raise SystemExit(
            f"The machine is busy: {reason}. Wait until it is idle, or measure all the same with --anyway."
        )
    content: dict[str, Any] = {"machine": machine(), "load": load, "busy": reason, "rows": []}
    for model in arguments.models:
        for layout in LAYOUTS:
            print(f"{model}, {layout} ...", file=sys.stderr)
            content["rows"].append(measure(model, SHAPES[model], layout, arguments.seconds))
    if out is not None:
        write(out, content)
    if arguments.json:
        print(json.dumps(content, allow_nan=False))
    else:
        from cpu_table import training_table

        print(training_table(content))


if __name__ == "__main__":
    main()
