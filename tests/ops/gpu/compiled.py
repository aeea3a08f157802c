"""Compiles what the backend launches for a GPU, which needs none: `test_kernels` runs it outside of the interpreter.

The launches are recorded, not run: the tensors lie on the CPU and their values are never read.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from steadynorm.activations import NAMES, Activation
from steadynorm.ops.gpu import backend, committing
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Operands, Train

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    found: list[Launch] = []

    def run(kernel, *args, grid, warmup, **options):
        named = dict(zip(kernel.arg_names, args, strict=False))
        named |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        assert list(named) == kernel.arg_names, "all arguments, in their order"
        assert all(1 <= n < 2**31 for n in grid)
        found.append(Launch(kernel, named, options))

    with patch.object(JITFunction, "run", run):
        yield found


def a_step(shape: tuple[int, ...], dtype: torch.dtype, layout: str, everything: bool, name: str | None) -> list[Launch]:
    """What a training step and its backward launch."""
    x = torch.empty(shape, dtype=dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    gamma = torch.empty(shape[1])
    position = torch.ones(shape[0], 1, *shape[2:]) if everything else None
    operands = Operands(
        x, gamma, gamma.clone(), x.clone() if everything else None, position, None if position is None else position > 0
    )
    spec = Train(Layout.of(x), 1e-5, None if name is None else Activation(name))
    with recorded() as found:
        _, statistics = backend.train(operands, spec)
        backend.backward(x, None, None, operands, statistics, spec)
        if everything:
            backend.normalize_by(statistics, operands, spec)
            moments = torch.zeros(shape[1]).double()
            backend.backward(x, moments, moments, operands, statistics, spec)
            buffers = torch.empty(shape[1]), torch.empty(shape[1]), *torch.tensor([4, 2]).unbind()
            committing.commit(*buffers, torch.empty(3, shape[1]).double(), 0.1, True)
            committing.commit(*buffers, torch.empty(3, shape[1]).double(), None, False)
    return found


def compiled(launch: Launch) -> Any:
    """Down to machine code, as the launcher would: pointers lie at multiples of 16 bytes."""
    types, constants, hints = {}, {}, {}
    fixed = {p.name for p in launch.kernel.params if p.is_constexpr}
    for i, (name, value) in enumerate(launch.arguments.items()):
        if name in fixed or value is None:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name], hints[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
    source = triton.compiler.ASTSource(launch.kernel, types, constants, hints)
    return triton.compile(source, target=TARGET, options=launch.options)


class Resources(NamedTuple):
    """Of one compiled kernel: registers per thread, bytes that did not fit in them, the widest loads and stores."""

    registers: int
    spilled: int
    loads: int
    stores: int


def resources(kernel: Any) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout).groups()
    ptx = kernel.asm["ptx"]

    def widest(which: str) -> int:
        moves = re.findall(rf"{which}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
        return max((int(n or 1) * int(bits) // 8 for n, bits in moves), default=0)

    return Resources(int(registers), int(stack), widest("ld"), widest("st"))


def main() -> None:
    seen = set()

    def check(shape: tuple[int, ...], dtype: torch.dtype, layout: str, everything: bool, name: str | None) -> None:
        for launch in a_step(shape, dtype, layout, everything, name):
            found = resources(compiled(launch))
            what = f"{launch.name} {tuple(shape)} {dtype} {layout} {name}: {found}"
            seen.add(launch.name)
            if "-v" in sys.argv:
                print(what)
            if "-v" in sys.argv:
                continue
            assert found.spilled == 0, what
            if launch.name.startswith(("split", "resident")) and not everything:
                assert found.loads == 16, what
                assert found.stores == 16 or launch.name in ("split.measure", "split.reduce"), what

    names = NAMES if "all" in sys.argv else ("gelu",)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels_last"):
            check((32, 64, 56, 56), dtype, layout, False, "relu")
    check((32, 256, 14, 14), torch.float32, "contiguous", False, "relu")
    check((100, 256), torch.float16, "contiguous", False, None)
    for name in names:
        check((32, 64, 28, 28), torch.float32, "contiguous", True, name)
    check((32, 24, 7, 7), torch.float64, "channels_last", True, "silu")
    check((33, 3, 7, 7), torch.float16, "contiguous", True, "mish")
    expected = {"split.measure", "split.normalize", "split.reduce", "split.gradient", "resident.forward"}
    expected |= {"resident.backward", "gathering.statistics", "gathering.gradients", "committing._commit"}
    assert seen == expected, seen
    print("compiled")


main()
